"""What a signalling service may do to who dials by it: it ends in an error that says so, or is dropped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from aiohttp import web  # noqa: E402
from raw_signalling import admit, say, site, talking  # noqa: E402
from webrtc_peers import HASTY, LIMITS, dialler, echo  # noqa: E402

from swarmcore_transports.webrtc.addresses import ServiceAddress  # noqa: E402
from swarmcore_transports.webrtc.signalling.messages import (  # noqa: E402
    MAX_SIGNAL,
    NEGOTIATION_ID_BYTES,
    Absent,
    Challenge,
    Envelope,
    Registered,
    signed_envelope,
)
from swarmcore_transports.webrtc.signalling.service import SignallingService  # noqa: E402


def somebody(service: ServiceAddress) -> Address:
    return service.address(Identity.generate().peer)


NO_CHALLENGE = {
    "garbage": "garbage",
    "bytes": b"\xff" * 100,
    "registered at once": Registered(),
    "an envelope": signed_envelope(
        Identity.generate(), Identity.generate().peer, bytes(NEGOTIATION_ID_BYTES), "offer", ""
    ),
    "too long": " " * (MAX_SIGNAL + 1),
}


@pytest.mark.parametrize("words", NO_CHALLENGE.values(), ids=NO_CHALLENGE.keys())
async def test_a_service_that_does_not_begin_as_one(words: Any) -> None:
    async with talking(say(words)) as service, dialler() as a:
        with pytest.raises(PeerUnreachableError, match=f"signalling service {service}: "):
            await a.open_stream(somebody(service))


async def test_a_service_that_takes_no_registration() -> None:
    async with talking(say(Challenge(bytes(32)), Challenge(bytes(32)))) as service, dialler() as a:
        with pytest.raises(PeerUnreachableError, match="does not take the registration"):
            await a.open_stream(somebody(service))


@pytest.mark.parametrize("words", [(), (Challenge(bytes(32)),)], ids=["no challenge", "no admission"])
async def test_a_service_that_falls_silent_ends_in_a_deadline(words: Any) -> None:
    async with talking(say(*words)) as service, dialler(HASTY) as a:
        with pytest.raises(PeerUnreachableError, match=str(service)):
            await a.open_stream(somebody(service))


@pytest.mark.parametrize("status", [200, 404, 500])
async def test_a_site_that_is_no_signalling_service(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text="good morning")

    async with site(answer) as service, dialler() as a:
        with pytest.raises(PeerUnreachableError, match=f"signalling service {service}: "):
            await a.open_stream(somebody(service))


async def test_a_place_where_nothing_is_ever_said() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    service = ServiceAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server, dialler(HASTY) as a:
        with pytest.raises(PeerUnreachableError, match=str(service)):
            await a.open_stream(somebody(service))


async def test_a_service_that_admits_everybody_and_passes_nothing() -> None:
    async with talking(admit) as service, dialler(HASTY) as a:
        address = somebody(service)
        with pytest.raises(PeerUnreachableError, match="did not answer"):
            await a.open_stream(address)


class Chattering(SignallingService):
    """Says a great deal of its own before it passes an answer."""

    CHATTER = 50

    def _pass(self, envelope: Envelope, sender: Any) -> None:
        if envelope.kind == "answer":
            receiver = self._peers[envelope.receiver]  # type: ignore[index]
            stranger = Identity.generate()
            for number in range(self.CHATTER):
                other = number.to_bytes(NEGOTIATION_ID_BYTES, "big")
                receiver.put(signed_envelope(stranger, receiver.peer, other, "answer", "for nothing"))
                receiver.put(Envelope(stranger.peer, receiver.peer, other, "offer", "", bytes(64)))
                receiver.put(Absent(stranger.peer, other, "it says"))
                receiver.put(Registered())
        super()._pass(envelope, sender)


async def test_what_a_service_says_of_its_own_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmcore_transports.webrtc.signalling.endpoints.SignallingService", Chattering)
    listener = webrtc.WebRtcTransport(Identity.generate(), limits=LIMITS, listen_on=["127.0.0.1:0"])
    try:
        [address] = await listener.listen(echo)
        async with dialler() as a:
            stream = await a.open_stream(address)
            await stream.send(b"there and back")
            assert bytes(await stream.receive()) == b"there and back"
            assert a.counters == {"ignored": Chattering.CHATTER, "forged": Chattering.CHATTER}
    finally:
        await listener.close()


async def opened(a: Any, address: Address) -> Stream:
    """A dial that was given up may have a moment left, in which it is what others wait for."""
    async with asyncio.timeout(10):
        while True:
            try:
                stream: Stream = await a.open_stream(address)
                return stream
            except PeerUnreachableError:
                await asyncio.sleep(0.01)


async def test_an_answer_after_the_deadline_is_counted_and_the_next_dial_is_a_new_one() -> None:
    """Held back until the dialler has given up, then all at once."""
    held: list[Any] = []

    class Late(SignallingService):
        def _pass(self, envelope: Envelope, sender: Any) -> None:
            if envelope.kind == "answer" and not released.is_set():
                held.append((envelope, sender))
            else:
                super()._pass(envelope, sender)

    released = asyncio.Event()
    late = Late()
    place = await late.start(ServiceAddress("127.0.0.1", 0))
    listener = webrtc.WebRtcTransport(Identity.generate(), limits=LIMITS, listen_on=[f"ws://{place}"])
    hasty = Limits(connect_timeout=1.5)
    try:
        [address] = await listener.listen(echo)
        async with dialler(hasty) as a:
            with pytest.raises(PeerUnreachableError, match="did not answer"):
                await a.open_stream(address)
            # What was given up may have a moment left, in which the answer would still count.
            async with asyncio.timeout(10):
                while not held or a._connector.negotiations._by_id:
                    await asyncio.sleep(0.001)
            released.set()
            for envelope, sender in held:
                late._pass(envelope, sender)
            stream = await opened(a, address)
            await stream.send(b"there and back")
            assert bytes(await stream.receive()) == b"there and back"
            assert held and a.counters == {"ignored": len(held)}
    finally:
        await listener.close()
        await late.close()


async def test_a_service_that_redirects_leads_nowhere() -> None:
    """Else whoever names a service makes us fetch from anywhere, also within our own network."""
    fetched = asyncio.Event()

    async def elsewhere(request: web.Request) -> web.Response:
        fetched.set()
        return web.Response()

    async with site(elsewhere) as inside:

        async def redirect(request: web.Request) -> web.Response:
            raise web.HTTPFound(f"http://{inside}{request.path}")

        async with site(redirect) as service, dialler() as a:
            with pytest.raises(PeerUnreachableError, match=f"signalling service {service}: "):
                await a.open_stream(somebody(service))
            assert not fetched.is_set()
