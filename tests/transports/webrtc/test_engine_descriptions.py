"""Descriptions and candidates that no honest peer sends, given to the WebRTC engine."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from swarmcore.errors import ProtocolError

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_engines import Messages, pair

from swarmcore_transports.local_addresses import reachable_hosts
from swarmcore_transports.webrtc.engine import PeerConnection
from swarmcore_transports.webrtc.sdp import attribute

NONSENSE = [
    "garbage",
    "\0\n",
    "ä" * 1000,
    "candidate:",
    "candidate:1",
    "candidate:1 1 udp 1 127.0.0.1 typ host",
    "candidate:1 1 udp x 127.0.0.1 9 typ host",
    "candidate:1 1 udp 1 127.0.0.1 port typ host",
    "candidate:1 1 udp 1 127.0.0.1 -1 typ host",
    "candidate:1 1 udp 1 127.0.0.1 99999 typ host",
    "candidate:1 1 udp -1 127.0.0.1 9 typ host",
    f"candidate:1 1 udp {2**70} 127.0.0.1 9 typ host",
    f"candidate:1 {2**70} udp 1 127.0.0.1 9 typ host",
    "candidate:1 2 udp 1 127.0.0.1 9 typ host",
    "candidate:1 x udp 1 127.0.0.1 9 typ host",
    "candidate:1 1 tcp 1 127.0.0.1 9 typ host tcptype passive",
    "candidate:1 1 sctp 1 127.0.0.1 9 typ host",
    "candidate:1 1 udp 1 127.0.0.1 9 typ nonsense",
    "candidate:1 1 udp 1 127.0.0.1 9 typ srflx raddr x rport y",
    "candidate:1 1 udp 1 999.0.0.1 9 typ host",
    "candidate:1 1 udp 1 nobody.invalid 9 typ host",
    "candidate:1 1 udp 1 nobody.local 9 typ host",
    "candidate:1 1 udp 1 fe80::1%nowhere 9 typ host",
    "candidate:1 1 udp 1 :: 9 typ host ufrag",
    "candidate:1 1 udp 1 224.0.0.1 9 typ host ufrag x generation y",
]

LINES = [
    "a=ice-lite",
    "a=ice-ufrag:x",
    "a=ice-ufrag:" + "x" * 300,
    "a=ice-pwd:",
    "a=ice-pwd:short",
    "a=mid:",
    "a=mid:other",
    "a=group:BUNDLE other",
    "a=group:BUNDLE",
    "a=group:",
    "a=fingerprint:sha-256 AB",
    "a=fingerprint:sha-256",
    "a=fingerprint:none AB:CD",
    "a=setup:nonsense",
    "a=setup:holdconn",
    "a=sctp-port:-1",
    "a=sctp-port:port",
    f"a=sctp-port:{2**40}",
    "a=max-message-size:-1",
    "a=max-message-size:much",
    f"a=max-message-size:{2**80}",
    "a=sctpmap:x y z",
    "a=candidate:",
    *(f"a={candidate}" for candidate in NONSENSE[4:]),
    "a=rtpmap:x",
    "a=ssrc:x",
    "a=msid-semantic:",
    "a=",
    "=",
    "m=application 0 UDP/DTLS/SCTP webrtc-datachannel",
    "m=application x UDP/DTLS/SCTP webrtc-datachannel",
    "m=application 9 DTLS/SCTP 5000",
    "m=application 9 DTLS/SCTP x",
    "m=application 9",
    "m=application ",
    "c=IN IP4 nowhere",
    "c=",
    "o=",
    "o=- x y IN IP6 ::",
    "s=",
    "t=x y",
    "b=AS:x",
    "v=77",
    "a=" + "x" * 10_000,
]

NO_DESCRIPTIONS = {
    "empty": lambda sdp: "",
    "prose": lambda sdp: "good morning",
    "zeros": lambda sdp: "\0" * 100,
    "half": lambda sdp: sdp[: len(sdp) // 3],
    "unsigned": lambda sdp: without(sdp, "a=fingerprint:"),
    "nameless": lambda sdp: without(sdp, "a=ice-ufrag:"),
    "keyless": lambda sdp: without(sdp, "a=ice-pwd:"),
    "short key": lambda sdp: sdp.replace("a=ice-pwd:", "a=ice-pwd:x\r\na=old-pwd:"),
    "without media": lambda sdp: without(sdp, "m="),
    "twice": lambda sdp: sdp + sdp[sdp.index("m=") :],
    "refused": lambda sdp: re.sub("m=application [0-9]+", "m=application 0", sdp),
    "audio": lambda sdp: sdp.replace("m=application", "m=audio"),
}


def without(sdp: str, start: str) -> str:
    return "".join(line for line in sdp.splitlines(keepends=True) if not line.startswith(start))


def garbled(sdp: str, seed: int) -> str:
    """``sdp`` with a few lines lost, said twice, cut, swapped or put in."""
    rng = random.Random(seed)
    lines = sdp.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        change = rng.randrange(6)
        if change == 0:
            del lines[at]
        elif change == 1:
            lines.insert(at, lines[at])
        elif change == 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif change == 3:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif change == 4:
            lines.insert(at, rng.choice(LINES))
        else:
            new = rng.choice(LINES)
            kind = new.partition(":")[0]
            same = [number for number, line in enumerate(lines) if line.partition(":")[0] == kind]
            lines[same[0] if same else at] = new
    return "".join(f"{line}\r\n" for line in lines)


@pytest.mark.parametrize("spoil", NO_DESCRIPTIONS.values(), ids=NO_DESCRIPTIONS.keys())
async def test_what_is_no_description_is_named_so_and_does_no_harm(spoil: Callable[[str], str]) -> None:
    async with pair() as found:
        offer = await found.dialler.offer()
        with pytest.raises(ProtocolError):
            await found.listener.answer(spoil(offer))
        answer = await found.listener.answer(offer)
        with pytest.raises(ProtocolError):
            await found.dialler.accept(spoil(answer))
        await found.dialler.accept(answer)
        await asyncio.gather(found.dialler.connected(), found.listener.connected())
        offer = await found.dialler.restart()
        with pytest.raises(ProtocolError):
            await found.listener.answer(spoil(offer))
        answer = await found.listener.answer(offer)
        with pytest.raises(ProtocolError):
            await found.dialler.accept(spoil(answer))
        await found.dialler.accept(answer)
        await there_and_back(*await found.channel(found.listener))


@pytest.mark.parametrize("some", range(3))
async def test_garbled_descriptions_are_taken_or_refused(some: int) -> None:
    for seed in range(5 * some, 5 * some + 5):
        async with pair() as found:
            with suppress(ProtocolError):
                await found.listener.answer(garbled(await found.dialler.offer(), seed))
        async with pair() as found:
            with suppress(ProtocolError):
                await found.dialler.accept(
                    garbled(await found.listener.answer(await found.dialler.offer()), seed)
                )


async def test_garbled_restarts_end_nothing() -> None:
    async with pair() as found:
        await found.connect()
        sender, receiver = await found.channel(found.dialler)
        for seed in range(40):
            with suppress(ProtocolError):
                await found.listener.answer(garbled(await found.dialler.restart(), seed))
            sender.channel.send(b"%d" % seed)
            assert await receiver.next() == b"%d" % seed
        await there_and_back(sender, receiver)


async def there_and_back(sender: Messages, receiver: Messages) -> None:
    sender.channel.send(b"there")
    assert await receiver.next() == b"there"
    receiver.channel.send(b"back")
    assert await sender.next() == b"back"


async def test_nonsense_in_place_of_candidates_is_ignored() -> None:
    async with pair() as found:
        sides = found.dialler, found.listener

        async def nonsense() -> None:
            for side in sides:
                for candidate in NONSENSE:
                    await side.add_candidate(candidate)

        await nonsense()
        offer = await found.dialler.offer()
        await nonsense()
        answer = await found.listener.answer(offer)
        await nonsense()
        await found.dialler.accept(answer)
        await nonsense()
        await asyncio.gather(found.dialler.connected(), found.listener.connected())
        await nonsense()
        await there_and_back(*await found.channel(found.dialler))
        await found.restart()
        await nonsense()
        await there_and_back(*await found.channel(found.listener))
        await found.close()
        await nonsense()


async def test_candidates_by_names_are_no_reason_to_give_up_at_their_end() -> None:
    """As browsers have them: who is behind one is learnt from its checks."""
    name = "candidate:1 1 udp 2113937151 1b2c3d4e-0000-4000-8000-000000000000.local 5001 typ host"
    async with pair() as found:
        offer = alone(await found.dialler.offer())
        answer = await found.listener.answer(offer)
        await found.listener.add_candidate(name)
        await found.listener.add_candidate("")
        await found.dialler.accept(answer)
        await asyncio.gather(found.dialler.connected(), found.listener.connected())
        answer = await found.listener.answer(alone(await found.dialler.restart()))
        await found.listener.add_candidate(name)
        await found.listener.add_candidate("")
        await found.dialler.accept(answer)
        await found.moved[found.dialler].wait()
        await there_and_back(*await found.channel(found.listener))


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Two on this machine that see whether anything is sent to them."""
    [host, *_] = reachable_hosts("0.0.0.0")
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for one in made:
        one.bind((host, 0))
        one.setblocking(False)
    yield made
    for one in made:
        one.close()


async def test_candidates_of_another_description_are_ignored(sockets: list[socket.socket]) -> None:
    """Where the first of two candidates leads, nobody looks."""
    async with pair() as found:
        answer = alone(await found.listener.answer(await found.dialler.offer()))
        await found.dialler.accept(answer)
        await tried(found.dialler, sockets, "foreign", attribute(answer, "ice-ufrag"))


async def test_candidates_of_an_earlier_description_are_ignored(sockets: list[socket.socket]) -> None:
    async with pair() as found:
        await found.connect()
        earlier, answer = [
            alone(await found.listener.answer(await found.dialler.restart())) for _ in range(2)
        ]
        await found.dialler.accept(answer)
        await tried(found.dialler, sockets, attribute(earlier, "ice-ufrag"), attribute(answer, "ice-ufrag"))


def alone(sdp: str) -> str:
    """``sdp`` without candidates, of which more may come."""
    return without(without(sdp, "a=candidate:"), "a=end-of-candidates")


async def tried(side: PeerConnection, sockets: list[socket.socket], wrong: str, right: str) -> None:
    """Of two sockets that are named to ``side`` only the one is looked for that has the ``right`` ufrag."""
    for one, ufrag in zip(sockets, [wrong, right], strict=True):
        host, port = one.getsockname()
        await side.add_candidate(f"candidate:1 1 udp 2113937151 {host} {port} typ host ufrag {ufrag}")
    assert await asyncio.get_running_loop().sock_recv(sockets[1], 2000)
    with pytest.raises(BlockingIOError):
        sockets[0].recv(2000)
