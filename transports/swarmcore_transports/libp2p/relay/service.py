"""The service of a circuit relay (version 2): reservations of peers that nobody can dial, and circuits.

In libp2p's specifications: relay/circuit-v2.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio
from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Reservation, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PeerMessage
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as HOP
from libp2p.relay.circuit_v2.protocol import STOP_PROTOCOL_ID as STOP
from libp2p.relay.circuit_v2.protocol_buffer import StatusCode, to_proto_status
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr

from swarmcore.types import PeerId, short
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.multiaddrs import is_relayed
from swarmcore_transports.libp2p.patches.host import reset
from swarmcore_transports.libp2p.relay.limits import (
    Circuit,
    Direction,
    RelayLimits,
    RelayRefusal,
    RelayResources,
)

logger = logging.getLogger(__name__)

_OK = to_proto_status(StatusCode.OK)
_ANSWER_SECONDS = 10.0
"""How long a peer may take to say what it wants, or whether it takes a circuit."""

_CHUNK_BYTES = 64 * 1024


class RelayService:
    """Relays for others while ``offers()`` is true; what it gives is bounded by ``limits``. Lives in trio.

    Neither reservations nor circuits are for peers that the host does not allow.
    """

    def __init__(self, host: Host, limits: RelayLimits, offers: Callable[[], bool]) -> None:
        self._host = host
        self._offers = offers
        self._resources = RelayResources(limits)
        self._offered = False
        self._update_event = trio.Event()

    def __repr__(self) -> str:
        return f"<RelayService {'on' if self._offered else 'off'} · {self._resources!r}>"

    async def run(self) -> None:
        """Offer the service whenever it is to be offered, and tell connected peers when that changes."""
        self._host.addresses.subscribe(self._update)
        while True:
            self._update_event = trio.Event()
            if self._offers() != self._offered:
                self._offered = not self._offered
                if self._offered:
                    self._host.serve(HOP, self._handle)
                else:
                    self._host.stop_serving(HOP)
                await self._host.push_identify()
            await self._update_event.wait()

    def _update(self) -> None:
        self._update_event.set()

    async def _handle(self, stream: INetStream) -> None:
        asker = PeerId(str(stream.muxed_conn.peer_id))
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                ask = await read_delimited_msg(stream, HopMessage)
            if self._host.path_of(stream) == "relayed" or not self._host.allows(asker):
                raise RelayRefusal(StatusCode.PERMISSION_DENIED)
            now = trio.current_time()
            self._resources.expire(self._is_connected, now)
            if ask.type == HopMessage.RESERVE:
                await self._reserve(stream, now)
            elif ask.type == HopMessage.CONNECT:
                await self._connect(stream, ID(ask.peer.id), now)
            else:
                raise RelayRefusal(StatusCode.MALFORMED_MESSAGE)
        except RelayRefusal as refusal:
            logger.debug("%s is refused a relay: %s", short(asker), refusal.status.name)
            await self._reply(stream, HopMessage(type=HopMessage.STATUS), refusal.status)
            await stream.close()

    def _is_connected(self, peer: PeerId) -> bool:
        return bool(self._host.connections(ID.from_string(peer), direct=True))

    @staticmethod
    def _remote_host(stream: INetStream) -> str:
        """The IP address of the asker, or its id where that is not known."""
        remote = stream.get_remote_address()
        return remote[0] if remote else str(stream.muxed_conn.peer_id)

    @staticmethod
    async def _reply(stream: INetStream, message: HopMessage, status: StatusCode) -> None:
        message.status = to_proto_status(status)
        with trio.fail_after(_ANSWER_SECONDS):
            await write_delimited_msg(stream, message)

    def _limit(self) -> Limit:
        limits = self._resources.limits
        return Limit(duration=int(limits.circuit_seconds), data=limits.circuit_bytes)

    # --- reservations ---------------------------------------------------------------------------------

    async def _reserve(self, stream: INetStream, now: float) -> None:
        """Give a reservation to the peer that Noise has proven to be at the other end, and for no other."""
        self._resources.reserve(PeerId(str(stream.muxed_conn.peer_id)), self._remote_host(stream), now)
        # The protocol wants the time of day.
        until = int(time.time() + self._resources.limits.reservation_seconds)
        own = [
            Multiaddr(f"{address}/p2p/{self._host.peer}")
            for address in self._host.addresses.all()
            if not is_relayed(address)
        ]
        reservation = Reservation(expire=until, addrs=[address.to_bytes() for address in own])
        message = HopMessage(type=HopMessage.STATUS, reservation=reservation, limit=self._limit())
        await self._reply(stream, message, StatusCode.OK)
        await stream.close()

    # --- circuits -------------------------------------------------------------------------------------

    async def _connect(self, src: INetStream, target: ID, now: float) -> None:
        circuit = self._resources.open(self._remote_host(src), PeerId(str(target)), now)
        dst: INetStream | None = None
        try:
            dst = await self._open_stop_stream(target, src.muxed_conn.peer_id)
            await self._reply(src, HopMessage(type=HopMessage.STATUS, limit=self._limit()), StatusCode.OK)
            with trio.move_on_after(self._resources.limits.circuit_seconds):
                async with trio.open_nursery() as nursery:
                    # A circuit is one connection: when one half ends, all of it does.
                    scope = nursery.cancel_scope
                    nursery.start_soon(self._copy, circuit, Direction.TO_TARGET, src, dst, scope)
                    nursery.start_soon(self._copy, circuit, Direction.TO_SOURCE, dst, src, scope)
            await reset(src)
        finally:
            self._resources.close(circuit)
            if dst:
                await reset(dst)

    async def _open_stop_stream(self, target: ID, source: ID) -> INetStream:
        """A stream to ``target`` that it has taken as a circuit from ``source``."""
        message = StopMessage(
            type=StopMessage.CONNECT, peer=PeerMessage(id=source.to_bytes()), limit=self._limit()
        )
        dst: INetStream | None = None
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                dst = await self._host.new_stream(target, STOP)
                await write_delimited_msg(dst, message)
                answer = await read_delimited_msg(dst, StopMessage)
            if answer.status != _OK:
                raise RelayRefusal(StatusCode.CONNECTION_FAILED)
        except BaseException as exc:
            if dst:
                await reset(dst)
            if isinstance(exc, Exception):
                raise RelayRefusal(StatusCode.CONNECTION_FAILED) from exc
            raise
        return dst

    async def _copy(
        self,
        circuit: Circuit,
        direction: Direction,
        src: INetStream,
        dst: INetStream,
        scope: trio.CancelScope,
    ) -> None:
        try:
            while data := await src.read(_CHUNK_BYTES):
                circuit.count_bytes(direction, len(data))
                await trio.sleep(self._resources.delay(len(data), trio.current_time()))
                await dst.write(data)
        except Exception as exc:
            logger.debug("a circuit to %s ends: %r", short(circuit.target), exc)
        scope.cancel()
