from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from swarmcore.identity import Identity
from swarmcore.testing.transport_contract import TransportContract
from swarmcore.transport import Transport
from swarmcore.types import Address, PeerId
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
endpoints = pytest.importorskip("swarmcore_transports.webrtc.signalling.endpoints")
signalling_service = pytest.importorskip("swarmcore_transports.webrtc.signalling.service")
signals = pytest.importorskip("swarmcore_transports.webrtc.signalling.messages")
locations = pytest.importorskip("swarmcore_transports.webrtc.addresses")


class Malicious(signalling_service.SignallingService):  # type: ignore[misc, name-defined]
    """Answers in the name of peers that are not there, as well as it can without their keys."""

    def _pass(self, envelope: Any, sender: Any) -> None:
        if envelope.receiver in self._peers:
            super()._pass(envelope, sender)
            return
        accomplice = Identity.generate()
        forged = signals.signed_envelope(
            accomplice, PeerId(envelope.sender), envelope.exchange, "answer", envelope.body
        )
        fields = {name: getattr(forged, name) for name in forged.__struct_fields__}
        sender.put(signals.Envelope(**{**fields, "sender": envelope.receiver}))


class TestWebRtc(TransportContract):
    @pytest.fixture(autouse=True)
    def malicious_service(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoints, "SignallingService", Malicious)

    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return webrtc.WebRtcTransport(identity, limits=limits, listen_on=listen_on)

    def free_place(self) -> str:
        return "127.0.0.1:0"

    async def send_garbage(self, address: Address, data: bytes) -> None:
        service = locations.service_of(address)
        reader, writer = await asyncio.open_connection(service.host, service.port)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            writer.write_eof()
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    @pytest.mark.every_loop
    async def test_messages_arrive_whole_and_in_order_both_ways(self) -> None:
        await super().test_messages_arrive_whole_and_in_order_both_ways()
