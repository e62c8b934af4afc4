"""Two peers and the services between them: dead, slow, malicious, or back again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest

from swarmcore.errors import PeerIdentityError, PeerUnreachableError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.pacing import TokenBucket
from swarmcore.types import Address, PeerId
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_peers import HASTY, LIMITS, dialler, echo, exchanged, service  # noqa: E402

from swarmcore_transports.webrtc.addresses import ServiceAddress, service_of  # noqa: E402
from swarmcore_transports.webrtc.connector import REFUSAL_RATE  # noqa: E402
from swarmcore_transports.webrtc.signalling.messages import (  # noqa: E402
    NEGOTIATION_ID_BYTES,
    Envelope,
    signed_envelope,
)
from swarmcore_transports.webrtc.signalling.negotiations import (  # noqa: E402
    FAIR_SECONDS,
    MAX_INCOMING_OFFERS_OF_PEER,
    IncomingOffers,
)
from swarmcore_transports.webrtc.signalling.service import SignallingService  # noqa: E402


@asynccontextmanager
async def met_at(*services: ServiceAddress, **options: Any) -> AsyncIterator[tuple[Any, list[Address]]]:
    """A peer that listens by way of ``services``, and its addresses."""
    options = {"limits": LIMITS, "identity": Identity.generate()} | options
    peer = webrtc.WebRtcTransport(listen_on=[f"ws://{one}" for one in services], **options)
    try:
        yield peer, list(await peer.listen(echo))
    finally:
        await peer.close()


class PeerRelay(SignallingService):
    """Passes each envelope as often as `altered` yields one."""

    def altered(self, envelope: Envelope) -> list[Envelope]:
        return [envelope]

    def _pass(self, envelope: Envelope, sender: Any) -> None:
        for one in self.altered(envelope):
            super()._pass(one, sender)


class Dropping(PeerRelay):
    def altered(self, envelope: Envelope) -> list[Envelope]:
        return []


class Repeating(PeerRelay):
    def altered(self, envelope: Envelope) -> list[Envelope]:
        return [envelope] * 20


class Rewriting(PeerRelay):
    """Puts a fingerprint of its own into every answer."""

    def altered(self, envelope: Envelope) -> list[Envelope]:
        body = envelope.body.replace("a=fingerprint:sha-256 ", "a=fingerprint:sha-256 00:")
        return [msgspec.structs.replace(envelope, body=body)]


class Misdirecting(PeerRelay):
    """Hands an answer to the answerer's own offers to somebody else: gives back what came, to its sender."""

    def altered(self, envelope: Envelope) -> list[Envelope]:
        if envelope.kind == "answer":
            return [msgspec.structs.replace(envelope, sender=envelope.receiver, receiver=envelope.receiver)]
        return [envelope]


class Late(PeerRelay):
    """Passes answers after a while, in another order than they came."""

    def _pass(self, envelope: Envelope, sender: Any) -> None:
        asyncio.get_running_loop().call_later(0.1, super()._pass, envelope, sender)


async def test_a_service_that_drops_ends_in_a_deadline():
    async with service(Dropping) as dropping, met_at(dropping.place) as (_, [address]), dialler(HASTY) as a:
        with pytest.raises(PeerUnreachableError, match="did not answer"):
            await a.open_stream(address)
        if a._connector.dials:
            await asyncio.wait(a._connector.dials._running)
        assert not a._connector.negotiations and not len(a._connector.connections)


@pytest.mark.parametrize("kind", [Repeating, Late])
async def test_repeated_and_late_envelopes_do_no_harm(kind: type[PeerRelay]):
    async with service(kind) as odd, met_at(odd.place) as (listener, [address]), dialler() as a:
        await exchanged(a, address)
        assert len(listener._connector.connections) == 1
        if kind is Repeating:
            assert listener.counters["repeated"] >= 19  # the offer's; those of what follows are yet to come


@pytest.mark.parametrize("kind", [Rewriting, Misdirecting])
async def test_a_service_that_lies_is_noticed(kind: type[PeerRelay]):
    async with service(kind) as lying, met_at(lying.place) as (listener, [address]), dialler(HASTY) as a:
        with pytest.raises((PeerIdentityError, PeerUnreachableError)):
            await a.open_stream(address)
        assert a.counters["forged"] + listener.counters["forged"] >= 1
        assert not len(listener._connector.connections)


class Nowhere:
    """A route by which nothing arrives."""

    async def send(self, envelope: Envelope) -> None: ...


async def test_an_offer_played_back_later_is_not_answered_again():
    heard: list[Envelope] = []

    class Recording(PeerRelay):
        def altered(self, envelope: Envelope) -> list[Envelope]:
            heard.append(envelope)
            return [envelope]

    async with (
        service(Recording) as recording,
        met_at(recording.place) as (listener, [address]),
        dialler() as a,
    ):
        await exchanged(a, address)
        again = next(one for one in heard if one.kind == "offer")
        listener._connector.negotiations.signalled(Nowhere(), again)
        assert listener.counters["repeated"] == 1
        assert not len(listener._connector.offers)


async def test_who_is_absent_is_told_at_once():
    async with service() as meeting, dialler(Limits(connect_timeout=60.0)) as a:
        nobody = meeting.place.address(Identity.generate().peer)
        async with asyncio.timeout(5):
            with pytest.raises(PeerUnreachableError, match="not connected to this signalling service"):
                await a.open_stream(nobody)


async def test_who_takes_no_connections_refuses_at_once():
    async with service() as meeting, dialler(Limits(connect_timeout=60.0)) as a, dialler() as deaf:
        deaf._connector.clients.keep(meeting.place)
        await deaf._connector.clients.keep(meeting.place).ready()
        async with asyncio.timeout(5):
            with pytest.raises(PeerUnreachableError, match="takes no connections"):
                await a.open_stream(meeting.place.address(deaf.identity.peer))


def garbage() -> list[str]:
    whole = "m=application 9 x webrtc-datachannel\na=fingerprint:x\na=ice-ufrag:x\na=ice-pwd:x\n"
    return [
        "",
        "garbage",
        "v=0\n" + whole,
        whole,
        whole.replace("9 x", "x 9"),
        "v=0\no=\nt=\n" + whole + "a=\n",
    ]


@pytest.mark.parametrize("body", garbage())
async def test_offers_that_cannot_be_read_are_refused(body: str):
    async with service() as meeting, met_at(meeting.place) as (listener, [address]), dialler() as a:
        with a._connector.clients.using(service_of(address)) as client:
            managed = await a._connector._new_connection(address.peer, b"e" * NEGOTIATION_ID_BYTES)
            negotiation = a._connector._negotiate(managed)
            await client.send(
                signed_envelope(a.identity, address.peer, managed.negotiation_id, "offer", body)
            )
            with pytest.raises(PeerUnreachableError, match="refuses: the peer sent"):
                async with asyncio.timeout(5):
                    await negotiation.answered
            await managed.connection.close()
        assert not len(listener._connector.offers)


@pytest.mark.parametrize("body", garbage())
async def test_answers_that_cannot_be_read_end_the_dial(body: str):
    async with service() as meeting, dialler() as a, dialler() as b:

        def answer(client: Any, offer: Envelope) -> None:
            said = signed_envelope(b.identity, PeerId(offer.sender), offer.exchange, "answer", body)
            b._connector.tasks.start(client.send(said), "answer")

        b._connector.negotiations._on_offer = answer
        await b._connector.clients.keep(meeting.place).ready()
        with pytest.raises(ProtocolError):
            await a.open_stream(meeting.place.address(b.identity.peer))


async def test_offers_beyond_the_bounds_are_refused_and_then_dropped():
    me = Identity.generate()
    target = webrtc.WebRtcTransport(me, limits=HASTY)
    target._connector.accepting = True
    _, refused = REFUSAL_RATE
    target._connector._refusals = TokenBucket(0.0, refused)  # on a busy machine this takes a while
    sent: list[str] = []

    class Client:
        async def send(self, envelope: Envelope) -> None:
            sent.append(envelope.body)

    flooders = [Identity.generate() for _ in range(4)]
    for number in range(300):
        exchange = number.to_bytes(NEGOTIATION_ID_BYTES, "big")
        offer = signed_envelope(flooders[number % 4], me.peer, exchange, "offer", "garbage")
        target._connector.negotiations.signalled(Client(), offer)
    assert target.counters["overflow"] == 300 - 4 * MAX_INCOMING_OFFERS_OF_PEER - refused
    assert len(target._connector.offers) == 4 * MAX_INCOMING_OFFERS_OF_PEER
    while target._connector.tasks:
        await asyncio.wait(tuple(target._connector.tasks._tasks))
    assert len([body for body in sent if "too many others" in body]) == refused
    assert not len(target._connector.offers)
    await target.close()


def test_offers_are_answered_once_and_some_at_a_time():
    offers = IncomingOffers(limit=3, limit_of_peer=2)
    assert offers.is_new(b"a") and not offers.is_new(b"a")
    begun = [offers.begin(PeerId(peer), 0.0) for peer in "aaabb"]
    assert [one is not None for one in begun] == [True, True, False, True, False]
    assert begun[0] is not None
    offers.end(begun[0])
    assert offers.begin(PeerId("b"), 0.0) and len(offers) == 3


def test_offers_that_take_long_make_room_for_others():
    offers = IncomingOffers(limit=2, limit_of_peer=2)
    given_up = []
    for peer in "ab":
        answering = offers.begin(PeerId(peer), 0.0)
        assert answering is not None
        answering.give_up = partial(given_up.append, peer)
    assert offers.begin(PeerId("c"), FAIR_SECONDS - 0.1) is None
    assert offers.begin(PeerId("c"), FAIR_SECONDS) is not None
    assert given_up == ["a"] and len(offers) == 2
    assert offers.begin(PeerId("c"), FAIR_SECONDS) is not None
    assert offers.begin(PeerId("c"), 2 * FAIR_SECONDS) is None  # its own do not
    assert given_up == ["a", "b"]
    for number in range(10_000):
        offers.is_new(number.to_bytes(16, "big"))
    assert len(offers._seen) == 4096


async def test_a_dead_service_is_skipped_and_one_that_returns_is_used_again():
    async with service() as living, service() as dying:
        second = dying.place
        async with met_at(living.place, dying.place) as (listener, [address, other]):
            await dying.close()
            async with dialler() as a, dialler() as b:
                with pytest.raises(PeerUnreachableError, match="signalling service"):
                    await a.open_stream(other)
                await exchanged(a, address)
                async with service(at=second) as returned:
                    async with asyncio.timeout(5):
                        await listener._connector.clients.keep(second)._registered.wait()
                    assert returned.counters["registered"] >= 1
                    await exchanged(b, other)


async def test_two_programs_with_one_identity_are_told_of_it(caplog: pytest.LogCaptureFixture):
    identity = Identity.generate()
    async with (
        service() as meeting,
        met_at(meeting.place, identity=identity),
        met_at(meeting.place, identity=identity),
        asyncio.timeout(10),
    ):
        while "give each an identity of its own" not in caplog.text:
            await asyncio.sleep(0.01)
    assert str(identity.peer) in caplog.text


async def test_a_peer_starts_while_one_of_its_services_is_dead():
    async with service() as living:
        async with service() as dead:
            pass
        async with met_at(dead.place, living.place) as (_, [_, address]), dialler() as a:
            await exchanged(a, address)
        with pytest.raises(PeerUnreachableError):
            async with met_at(dead.place):
                pass


async def test_connections_outlive_the_service():
    async with service() as meeting, met_at(meeting.place) as (_, [address]), dialler() as a:
        stream = await a.open_stream(address)
        await meeting.close()
        await stream.send(b"still there")
        assert bytes(await stream.receive()) == b"still there"
        await exchanged(a, address)
