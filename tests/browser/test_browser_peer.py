"""A page in Chromium as a peer of a swarm of real servers. Without Chromium these tests are skipped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

import swarmcore
from swarmcore import Identity
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess

pytest.importorskip("aiortc", reason="needs the extra webrtc")
import chromium

from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.signalling.messages import signed_envelope
from swarmcore_transports.webrtc.signalling.service import SignallingService

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(
        chromium.installed() is None, reason="chromium is not installed: no browser to test with"
    ),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
SCREENSHOT = os.environ.get("SWARMCORE_SCREENSHOT")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TCP = ("--transport", "tcp", "--listen", "tcp://127.0.0.1:0")
BOTH = (*TCP, "--transport", "webrtc", "--listen", "webrtc://127.0.0.1:0")
JOINED = """
    const [{ Swarm }, { Identity }] = await Promise.all([import('/swarm.js'), import('/identity.js')]);
    const swarm = new Swarm(await Identity.generate());
    await swarm.join(address);
    const generate = async options => {
      let text = '';
      for await (const piece of swarm.generate(question, options)) text += piece;
      return text;
    };
"""
ROWS = (
    "[...document.querySelectorAll('#servers tr')].map(row => [...row.cells].map(cell => cell.textContent))"
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def servers(fork_server: ForkServer, smollm2_folder: Path) -> AsyncIterator[list[ServerProcess]]:
    """A generation server with blocks, a server that a page can reach, and one that it cannot."""
    model = ("--model", str(smollm2_folder), "--dtype", "float32", "--threads", "1", "--cache-tokens", "2048")
    async with AsyncExitStack() as stack:
        head = ("--blocks", "0:10", "--serve-head", "--name", "head")
        first = await stack.enter_async_context(await fork_server.start("serve", *model, *BOTH, *head))
        join = ("--bootstrap", first.address)
        others = await asyncio.gather(
            fork_server.start("serve", *model, *BOTH, "--blocks", "10:20", *join),
            fork_server.start("serve", *model, *TCP, "--blocks", "20:30", *join),
        )
        for server in others:
            await stack.enter_async_context(server)
        yield [first, *others]


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Where the page is served."""
    command = [sys.executable, str(EXAMPLE / "serve.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def page(site: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[chromium.Page]:
    async with chromium.Page(tmp_path_factory.mktemp("chromium")) as page:
        await page.open(site)
        await page.until("document.getElementById('own')?.textContent")
        yield page


def webrtc_address(server: ServerProcess) -> str:
    addresses: list[str] = server.online["addresses"]
    return next(address for address in addresses if address.startswith("webrtc:"))


async def test_page_lists_servers_measures_and_chats(
    page: chromium.Page, site: str, servers: list[ServerProcess]
) -> None:
    await page.open(f"{site}#{webrtc_address(servers[0])}")
    await page.until("document.getElementById('state').textContent.includes('Press Join')")
    assert await page.run(f"return {ROWS}.length") == 0, "a link does not join by itself"
    await page.run("document.forms.join.requestSubmit()")
    measured = f"{ROWS}.filter(cells => cells[4].endsWith(' ms')).length === 2"
    await page.until(f"{ROWS}.length === 3 && {measured}")
    seen = {cells[2]: cells for cells in await page.run(f"return {ROWS}")}
    assert set(seen) == {"0:10", "10:20", "20:30"}
    assert seen["0:10"][0].endswith(" head")
    assert seen["20:30"][4] == "no address for pages"

    await page.until("!document.querySelector('#chat button').disabled")
    await page.run(
        """
        const talk = document.getElementById('talk');
        window.lengths = new Set();
        new MutationObserver(() => window.lengths.add(talk.textContent.length))
          .observe(talk, { childList: true, subtree: true, characterData: true });
        document.querySelector('#chat input').value = question[0].content;
        document.getElementById('chat').requestSubmit();
        """,
        question=QUESTION,
    )
    await page.until("window.lengths.size > 5")  # it comes piece by piece
    await page.until("!document.querySelector('#chat button').disabled", 60)
    assert "Paris" in await page.run("return document.querySelector('#talk .assistant').textContent")
    if SCREENSHOT:
        await asyncio.to_thread(Path(SCREENSHOT).write_bytes, await page.screenshot())


async def test_same_text_as_for_a_client_in_python(page: chromium.Page, servers: list[ServerProcess]) -> None:
    script = (
        JOINED
        + "try { return await generate({ temperature: 0, max_new_tokens: 24 }) } finally { swarm.close() }"
    )
    said = await page.run(script, address=webrtc_address(servers[0]), question=QUESTION)
    async with swarmcore.connect(servers[0].address) as swarm:
        assert said == await swarm.generate(QUESTION, temperature=0.0, max_new_tokens=24)


async def test_refused_request_says_why(page: chromium.Page, servers: list[ServerProcess]) -> None:
    script = JOINED + "try { await generate({ temperature: -1 }) } finally { swarm.close() }"
    with pytest.raises(AssertionError, match=r"InputError: .*temperature"):
        await page.run(script, address=webrtc_address(servers[0]), question=QUESTION)


async def test_long_messages_both_ways(page: chromium.Page, servers: list[ServerProcess]) -> None:
    """Several at a time, each in several frames that wait for credit."""
    script = """
        const names = ['connection', 'identity', 'rpc', 'signalling'];
        const [{ Connection }, { Identity }, { call }, { Signalling, parseAddress }] =
          await Promise.all(names.map(name => import(`/${name}.js`)));
        const { url, peer } = parseAddress(address);
        const signalling = await Signalling.connect(url, await Identity.generate());
        const connection = await Connection.dial(peer, signalling);
        const echo = async seed => {
          const payload = Uint8Array.from({ length: 900_000 }, (_, i) => (i * seed) % 251);
          const stream = await connection.openStream();
          const reply = await call(stream, '/swarmcore/ping/1', 'Ping', { payload }, 'Pong', 20);
          return payload.every((byte, i) => reply.payload[i] === byte);
        };
        const same = await Promise.all([1, 2, 3].map(echo));
        connection.close();
        return same;
    """
    assert await page.run(script, address=webrtc_address(servers[1])) == [True] * 3


ECHO = """
    const names = ['connection', 'identity', 'rpc', 'signalling'];
    const [{ Connection }, { Identity }, { call }, { Signalling, parseAddress }] =
      await Promise.all(names.map(name => import(`/${name}.js`)));
    const Plain = RTCPeerConnection;
    let rtc;
    window.RTCPeerConnection = class extends Plain { constructor (...all) { super(...all); rtc = this; } };
    const { url, peer } = parseAddress(address);
    const signalling = await Signalling.connect(url, await Identity.generate());
    const connection = await Connection.dial(peer, signalling);
    window.RTCPeerConnection = Plain;
    const ufrags = () => [rtc.localDescription, rtc.remoteDescription]
      .map(({ sdp }) => /a=ice-ufrag:(\\S+)/.exec(sdp)[1]);
    const echo = async seed => {
      const payload = Uint8Array.from({ length: 900_000 }, (_, i) => (i * seed) % 251);
      const stream = await connection.openStream();
      const reply = await call(stream, '/swarmcore/ping/1', 'Ping', { payload }, 'Pong', 20);
      return payload.every((byte, i) => reply.payload[i] === byte);
    };
"""


async def test_candidates_follow_the_offer(page: chromium.Page, servers: list[ServerProcess]) -> None:
    """The offer is not held back for them."""
    sent = """
        const sent = [];
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (text) {
          sent.push(JSON.parse(text));
          return send.call(this, text);
        };
    """
    rest = """
        WebSocket.prototype.send = send;
        connection.close();
        return sent.filter(({ type }) => type === 'envelope').map(({ kind, body }) => [kind, body]);
    """
    await_end = "while (!sent.some(({ body }) => body?.endsWith('end-of-candidates'))) await echo(1);"
    envelopes = await page.run(sent + ECHO + await_end + rest, address=webrtc_address(servers[1]))
    kinds = [kind for kind, _ in envelopes]
    assert kinds == ["offer"] + (len(kinds) - 1) * ["candidate"]
    offer = envelopes[0][1]
    assert "a=candidate:" not in offer
    [ufrag] = [line.partition(":")[2] for line in offer.splitlines() if line.startswith("a=ice-ufrag:")]
    lines = [line for _, body in envelopes[1:] for line in body.split("\n")]
    assert lines.pop() == "end-of-candidates"
    assert lines
    assert all(line.startswith("candidate:") and f" ufrag {ufrag}" in line for line in lines)


async def test_streams_go_on_when_a_page_restarts_ice(
    page: chromium.Page, servers: list[ServerProcess]
) -> None:
    script = """
        let enough = false;
        let echoes = 0;
        const talk = async seed => {
          let same = true;
          for (; !enough; echoes++) same = await echo(seed) && same;
          return same;
        };
        const talking = Promise.all([talk(1), talk(2)]);
        const seen = [ufrags()];
        for (let i = 0; i < 3; i++) {
          await connection.restart();
          seen.push(ufrags());
          const before = echoes;
          while (echoes < before + 4) await new Promise(resolve => setTimeout(resolve, 20));
        }
        enough = true;
        const same = await talking;
        connection.close();
        return [same, seen];
    """
    same, seen = await page.run(ECHO + script, address=webrtc_address(servers[1]))
    assert same == [True, True]
    for ours_or_theirs in zip(*seen, strict=True):
        assert len(set(ours_or_theirs)) == 4


async def test_a_page_looks_for_a_path_when_the_peer_is_silent(
    page: chromium.Page, servers: list[ServerProcess]
) -> None:
    begin = """
        const stream = await connection.openStream();
        window.silent = { connection, rtc, echo, ufrags, stream, before: ufrags() };
    """
    rest = """
        const { connection, rtc, echo, ufrags, stream, before } = window.silent;
        while (rtc.signalingState !== 'stable') {
          await new Promise(resolve => rtc.addEventListener('signalingstatechange', resolve, { once: true }));
        }
        const after = ufrags();
        const same = await echo(3);
        const ended = stream.ended;
        connection.close();
        return [same, ended, before.every((ufrag, i) => ufrag !== after[i])];
    """
    await page.run(ECHO + begin, address=webrtc_address(servers[1]))
    servers[1].signal(signal.SIGSTOP)
    try:
        await page.until("window.silent.rtc.signalingState === 'have-local-offer'")
    finally:
        servers[1].signal(signal.SIGCONT)
    assert await page.run(rest) == [True, False, True]


async def test_a_text_goes_on_when_the_machine_changes_its_network(
    page: chromium.Page, servers: list[ServerProcess]
) -> None:
    """The same generation server goes on, and the chat works afterwards."""
    script = """
        const restarted = [];
        const createOffer = RTCPeerConnection.prototype.createOffer;
        RTCPeerConnection.prototype.createOffer = function (options) {
          if (options?.iceRestart) restarted.push(this);
          return createOffer.call(this, options);
        };
        const makers = [];
        swarm.addEventListener('head', event => makers.push(event.detail));
        const pieces = swarm.generate(question, { temperature: 0, max_new_tokens: 24, min_new_tokens: 24 });
        let text = (await pieces.next()).value;
        dispatchEvent(new Event('online'));
        for await (const piece of pieces) text += piece;
        while (restarted.length === 0 || restarted.some(rtc => rtc.signalingState !== 'stable')) {
          await new Promise(resolve => setTimeout(resolve, 20));
        }
        RTCPeerConnection.prototype.createOffer = createOffer;
        const again = await generate({ temperature: 0, max_new_tokens: 24, min_new_tokens: 24 });
        const states = restarted.map(rtc => rtc.connectionState);
        swarm.close();
        return [text, again, makers, states];
    """
    text, again, makers, states = await page.run(
        JOINED + script, address=webrtc_address(servers[0]), question=QUESTION
    )
    assert text == again
    assert makers == [servers[0].peer] * 2
    assert set(states) == {"connected"}


async def test_garbage_from_a_page_harms_nobody(page: chromium.Page, servers: list[ServerProcess]) -> None:
    nonsense = (Path(__file__).parent / "nonsense.js").read_text()
    assert await page.run(nonsense, address=webrtc_address(servers[1])) == 11
    assert servers[1].returncode is None
    assert "Traceback" not in servers[1].log


async def test_wrong_peer_id_is_refused(page: chromium.Page, servers: list[ServerProcess]) -> None:
    """The signalling service of a server is asked for a peer that is not there."""
    elsewhere = webrtc_address(servers[0]).replace(servers[0].peer, Identity.generate().peer)
    with pytest.raises(AssertionError, match=r"PeerUnreachableError: .* cannot be reached"):
        await page.run(JOINED, address=elsewhere)


class Forging(SignallingService):
    """Answers offers itself, in the name of whoever they are for."""

    def _pass(self, envelope: Any, sender: Any) -> None:
        answer = signed_envelope(
            Identity.generate(), envelope.sender, envelope.exchange, "answer", envelope.body
        )
        sender.put(msgspec.structs.replace(answer, sender=envelope.receiver))


async def test_signalling_service_cannot_answer_for_others(page: chromium.Page) -> None:
    service = Forging()
    place = await service.start(ServiceAddress("127.0.0.1", 0))
    try:
        with pytest.raises(AssertionError, match=r"PeerIdentityError: .* did not sign"):
            await page.run(JOINED, address=str(place.address(Identity.generate().peer)))
    finally:
        await service.close()


async def test_identity_is_kept_by_the_browser(page: chromium.Page, site: str) -> None:
    """But for a second page, which is another peer."""
    own = "document.getElementById('own')?.textContent"
    await page.open(site)
    before = await page.until(own)
    await page.open(site)
    assert await page.until(own) == before
    second = "const { Identity } = await import('/identity.js'); return (await Identity.ofThisBrowser()).peer"
    assert await page.run(second) != before


async def test_generation_server_dies_while_the_page_reads(
    page: chromium.Page, fork_server: ForkServer, servers: list[ServerProcess], smollm2_folder: Path
) -> None:
    """Another one goes on with the same text, and the dead one is listed no more."""
    gateway = await fork_server.start(
        *("bootstrap", "--serve-head", "--model", str(smollm2_folder), "--dtype", "float32"),
        *(*BOTH, "--bootstrap", servers[0].address),
    )
    beginning = """
        const heads = () => Object.getOwnPropertyDescriptor(Swarm.prototype, 'heads').get.call(swarm);
        const before = other => other.peer === gateway ? -1 : 1;
        Object.defineProperty(swarm, 'heads', { get: () => heads().sort(before) });
        while (swarm.heads[0]?.peer !== gateway || swarm.heads.length < 2) {
          await new Promise(resolve => swarm.addEventListener('changed', resolve, { once: true }));
        }
        const makers = [];
        swarm.addEventListener('head', event => makers.push(event.detail));
        const pieces = swarm.generate(question, { temperature: 0, max_new_tokens: 32, min_new_tokens: 32 });
        window.state = { swarm, pieces, makers, text: (await pieces.next()).value };
    """
    rest = """
        const { swarm, pieces, makers } = window.state;
        let { text } = window.state;
        for await (const piece of pieces) text += piece;
        while (swarm.servers.some(({ peer }) => peer === gateway)) {
          await new Promise(resolve => swarm.addEventListener('changed', resolve, { once: true }));
        }
        swarm.close();
        return [text, makers];
    """
    try:
        address = webrtc_address(servers[0])
        await page.run(JOINED + beginning, address=address, question=QUESTION, gateway=gateway.peer)
    finally:
        await gateway.kill()
    said, makers = await page.run(rest, gateway=gateway.peer)
    assert makers == [gateway.peer, servers[0].peer]
    async with swarmcore.connect(servers[0].address) as swarm:
        plain = swarm.generate(QUESTION, temperature=0.0, max_new_tokens=32, min_new_tokens=32)
        assert said == await plain


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False, 0, 127, 128, -1, -32, -33, -129, 65535, 65536, 2**32, -(2**40), 2**53 - 1],
        [0.5, -1e300, "", "é" * 20, "x" * 70_000, "\u2028"],
        {"a": {"b": [[], {}]}, **{str(number): number for number in range(20)}},
        list(range(70_000)),
    ],
    ids=["nil", "integers", "floats and texts", "maps", "long"],
)
async def test_msgpack_is_that_of_python(page: chromium.Page, value: Any) -> None:
    """What Python packs is read, and what the page packs is read by Python, as the same value."""
    packed = list(msgspec.msgpack.encode(value))
    again = await page.run(
        "const { decode, encode } = await import('/msgpack.js');"
        "return [...encode(decode(Uint8Array.from(packed)))]",
        packed=packed,
    )
    assert msgspec.msgpack.decode(bytes(again)) == value


@pytest.mark.parametrize(
    "bad",
    [
        *(b"", b"\xc1", b"\xa1\xff", b"\x01\x02", b"\x81\x01\x01", b"\xd4\x01\x01", b"\xcf\x01"),
        *(b"\x91" * 100, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\x01", b"\xc6\xff\xff\xff\xff"),
    ],
    ids=bytes.hex,
)
async def test_what_is_no_msgpack_is_refused(page: chromium.Page, bad: bytes) -> None:
    script = "const { decode } = await import('/msgpack.js'); decode(Uint8Array.from(bad))"
    with pytest.raises(AssertionError, match="ProtocolError: a malformed record"):
        await page.run(script, bad=list(bad))
