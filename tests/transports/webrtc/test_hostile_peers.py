"""Peers that begin an exchange as they should not, or never end it: errors and refusals, each in its time."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarmcore.errors import PeerUnreachableError, ProtocolError
from swarmcore.types import Address
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from raw_signalling import RawPeer, registered  # noqa: E402
from webrtc_peers import dialler, listening, service  # noqa: E402

from swarmcore_transports.webrtc.addresses import service_of  # noqa: E402
from swarmcore_transports.webrtc.sdp import MAX_CANDIDATES, MAX_LINES  # noqa: E402
from swarmcore_transports.webrtc.signalling.messages import NEGOTIATION_ID_BYTES, Absent  # noqa: E402
from swarmcore_transports.webrtc.signalling.negotiations import MAX_INCOMING_OFFERS_OF_PEER  # noqa: E402


async def serves(address: Address) -> None:
    """Somebody else is answered."""
    async with dialler() as other:
        stream = await other.open_stream(address)
        await stream.send(b"there and back")
        assert bytes(await stream.receive()) == b"there and back"


@pytest.fixture
def nowhere() -> Iterator[int]:
    """A port of this machine where packets come, and none goes out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        yield silent.getsockname()[1]


def description(port: int, *, setup: str = "actpass", candidates: int = 1, more: str = "") -> str:
    """Of a peer that is nowhere."""
    host = [
        f"a=candidate:{number} 1 udp {2**31 - number} 127.0.0.1 {port} typ host\r\n"
        for number in range(candidates)
    ]
    fingerprint = ":".join(["AB"] * 32)
    return (
        "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n"
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\n"
        f"{''.join(host)}a=end-of-candidates\r\n"
        f"a=ice-ufrag:{secrets.token_hex(2)}\r\na=ice-pwd:{secrets.token_hex(11)}\r\n"
        f"a=fingerprint:sha-256 {fingerprint}\r\na=setup:{setup}\r\n"
        f"a=sctp-port:5000\r\na=max-message-size:262144\r\n{more}"
    )


async def offer(peer: RawPeer, address: Address, body: str, exchange: bytes = b"") -> tuple[str, str]:
    """The kind and the text of what comes back."""
    exchange = exchange or secrets.token_bytes(NEGOTIATION_ID_BYTES)
    await peer.send(address.peer, exchange, "offer", body)
    while True:
        reply = await peer.receive()
        if reply.exchange == exchange:
            assert not isinstance(reply, Absent)
            return reply.kind, reply.body


TOO_MUCH = {
    "candidates": ({"candidates": MAX_CANDIDATES + 1}, f"more than {MAX_CANDIDATES}"),
    "lines": ({"more": "a=x\r\n" * MAX_LINES}, f"more than {MAX_LINES}"),
    "media": ({"more": "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\n"}, "2 media sections"),
}


@pytest.mark.parametrize(("fields", "says"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
async def test_an_offer_of_too_much_is_refused_at_once(nowhere: int, fields: Any, says: str) -> None:
    async with (
        listening(Limits(connect_timeout=60.0)) as (_, address),
        registered(service_of(address)) as peer,
    ):
        async with asyncio.timeout(5):
            kind, reason = await offer(peer, address, description(nowhere, **fields))
        assert kind == "refusal" and says in reason


@asynccontextmanager
async def asked(seconds: float) -> AsyncIterator[tuple[asyncio.Task[Any], Callable[[str], Awaitable[None]]]]:
    """A transport that dials a raw peer, as a task, and what sends the answer to its offer."""
    async with (
        service() as meeting,
        registered(meeting.place) as peer,
        dialler(Limits(connect_timeout=seconds)) as a,
    ):
        dialling = asyncio.create_task(a.open_stream(meeting.place.address(peer.peer)))
        offered = await peer.receive()
        assert not isinstance(offered, Absent)
        yield dialling, lambda body: peer.send(a.identity.peer, offered.exchange, "answer", body)


@pytest.mark.parametrize(("fields", "says"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
async def test_an_answer_of_too_much_ends_the_dial(nowhere: int, fields: Any, says: str) -> None:
    async with asked(60.0) as (dialling, answer):
        await answer(description(nowhere, setup="active", **fields))
        with pytest.raises(ProtocolError, match=says):
            async with asyncio.timeout(5):
                await dialling


async def test_a_peer_that_answers_and_is_nowhere_ends_in_a_deadline(nowhere: int) -> None:
    async with asked(1.0) as (dialling, answer):
        await answer(description(nowhere, setup="active"))
        with pytest.raises(PeerUnreachableError):
            async with asyncio.timeout(5):
                await dialling


async def test_offers_of_who_never_comes_hold_no_place_for_long(nowhere: int) -> None:
    """So many of one peer are answered at a time; others are served meanwhile, and later there is room."""
    async with (
        listening(Limits(connect_timeout=3.0)) as (_, address),
        registered(service_of(address)) as peer,
    ):
        body = description(nowhere, candidates=MAX_CANDIDATES)
        async with asyncio.timeout(15):
            for _ in range(MAX_INCOMING_OFFERS_OF_PEER):
                assert await answered(peer, address, body)
            assert not await answered(peer, address, body)
            await serves(address)
            while not await answered(peer, address, body):
                await asyncio.sleep(0.1)


async def test_a_flood_of_candidates_is_dropped_and_counted(nowhere: int) -> None:
    envelopes, lines = 5 * MAX_CANDIDATES, 40
    async with (
        listening(Limits(connect_timeout=60.0)) as (listener, address),
        registered(service_of(address)) as peer,
    ):
        exchange = secrets.token_bytes(NEGOTIATION_ID_BYTES)
        body = description(nowhere).replace("a=end-of-candidates\r\n", "")
        assert (await offer(peer, address, body, exchange))[0] == "answer"
        for host in range(envelopes):
            flood = [f"candidate:1 1 udp 1 127.0.1.{host} {9 + port} typ host" for port in range(lines)]
            flood[0] = "candidate:" + "9" * 600
            await peer.send(address.peer, exchange, "candidate", "\n".join(flood))
        # What is sent after them is answered when they have been looked at.
        assert await offer(peer, address, description(nowhere, candidates=MAX_CANDIDATES + 1))
        taken = envelopes * lines - listener.counters["ignored"]
        assert taken == MAX_CANDIDATES + 1
        under_way = listener._connector.negotiations._by_id[exchange]
        assert not under_way._remote_candidates and len(under_way._known_signatures) < envelopes
        agent = under_way.connection._agent_in_use()
        assert len(agent.remote_candidates) == 1 + taken
        assert len(agent._check_list) <= len(agent.remote_candidates) * len(agent.local_candidates)
        await serves(address)


async def answered(peer: RawPeer, address: Address, body: str) -> bool:
    kind, reason = await offer(peer, address, body)
    assert kind == "answer" or "too many others" in reason
    return kind == "answer"
