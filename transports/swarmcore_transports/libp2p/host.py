"""The trio side of the transport: one libp2p host, what it dials, and what it accepts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import cast
from weakref import WeakSet

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.identity.identify_push.identify_push import push_identify_to_peers
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.rcmgr import Direction
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p.addresses import AddressManager
from swarmcore_transports.libp2p.host_factory import make_host
from swarmcore_transports.libp2p.multiaddrs import is_relayed, resolve_wildcards
from swarmcore_transports.libp2p.patches import host as patches
from swarmcore_transports.libp2p.patches.host import reset
from swarmcore_transports.libp2p.patches.tcp import TcpSocket, TcpSockets
from swarmcore_transports.libp2p.patches.yamux import SILENT_KEEPALIVES, is_silent, silent_for
from swarmcore_transports.libp2p.socket_accounting import SocketAccounting

logger = logging.getLogger(__name__)

PROTOCOL = TProtocol("/swarmcore/stream/1")
"""Our framed streams inside one libp2p stream each."""

_TELL_SECONDS = 5.0

StreamHandler = Callable[[INetStream, PeerId, str, trio.Event], None]
"""Takes a stream that a peer opened, the peer, the path; sets the event when it has let the stream go."""


class ConnectionEvents(INotifee):
    """Calls everything in ``on_connected`` and ``on_disconnected``, which may neither wait nor raise."""

    def __init__(self) -> None:
        self.on_connected: list[Callable[[INetConn], None]] = []
        self.on_disconnected: list[Callable[[INetConn], None]] = []

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        for callback in self.on_connected:
            callback(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        for callback in self.on_disconnected:
            callback(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


class Host:
    """Runs in the trio thread; every method but the constructor is called there."""

    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        addresses: AddressManager,
        on_stream: StreamHandler,
        on_direct: Callable[[PeerId], None],
        allows: Callable[[PeerId], bool],
        accounting: SocketAccounting,
    ) -> None:
        self._sockets = TcpSockets(limits, accounting)
        self.libp2p, self.swarm = make_host(identity, limits, self._sockets, addresses.all)
        self.peer = identity.peer
        self.addresses = addresses
        self.limits = limits
        self._on_stream = on_stream
        self.on_direct = on_direct
        """To be called when a peer that was reached through a relay is reached directly as well."""
        self.allows = allows
        """Whether a peer may use what this one offers to others, relaying and dialling back."""
        self._dials: dict[Multiaddr, trio.Event] = {}
        self.events = ConnectionEvents()
        self.swarm.register_notifee(self.events)
        self._accounting = accounting
        self.events.on_connected.append(self._peer_proven)
        self.dial_relayed: Callable[[ID, Multiaddr], Awaitable[None]] = _no_relay_client
        """Makes a connection at an address that leads through a relay; for a relay client to set."""
        self.hole_punched: WeakSet[INetConn] = WeakSet()
        """The direct connections that came about by hole punching."""

    def _peer_proven(self, connection: INetConn) -> None:
        if sock := self.socket_of(connection):
            self._accounting.proven(sock, PeerId(str(connection.muxed_conn.peer_id)))

    def socket_of(self, connection: INetConn) -> TcpSocket | None:
        """The socket that carries ``connection``, unless that is relayed."""
        if not is_direct(connection):
            return None
        return self._sockets.at(connection.muxed_conn.get_remote_address())  # type: ignore[attr-defined]

    def close_idle_connection(self) -> None:
        """Cut the oldest connection that others have dialled and that carries nothing."""
        for connection in self.swarm.get_connections():
            carries = is_outbound(connection) or connection.get_streams()
            if not carries and (sock := self.socket_of(connection)):
                sock.cut()
                return

    async def run(
        self, services: Callable[[], Awaitable[None]], ready: Callable[[], None], stop: trio.Event
    ) -> None:
        """Live, with ``services`` running, until ``stop``; then close every connection."""
        self.serve(PROTOCOL, self._accept)
        try:
            async with self.libp2p.run(listen_addrs=[]):
                async with trio.open_nursery() as background:
                    background.start_soon(services)
                    ready()
                    await stop.wait()
                    background.cancel_scope.cancel()
                await patches.close(self.swarm)
        finally:
            self._sockets.close_all()

    def serve(self, protocol: TProtocol, handler: Callable[[INetStream], Awaitable[None]]) -> None:
        """Give each incoming stream of ``protocol`` to ``handler``, whose errors end that stream alone."""

        async def guarded(stream: INetStream) -> None:
            try:
                await handler(stream)
            except Exception as exc:
                logger.debug("%s of %s failed: %r", protocol, stream.muxed_conn.peer_id, exc)
                await reset(stream)

        self.libp2p.set_stream_handler(protocol, guarded)

    def stop_serving(self, protocol: TProtocol) -> None:
        """Take no further streams of ``protocol``."""
        self.libp2p.remove_stream_handler(protocol)

    async def push_identify(self) -> None:
        """Say to every connected peer what this one speaks and where it is, as far as they listen."""
        with trio.move_on_after(_TELL_SECONDS):
            try:
                await push_identify_to_peers(self.libp2p)
            except Exception as exc:
                logger.debug("not everybody was told what this peer speaks: %r", exc)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, places: Sequence[Multiaddr]) -> None:
        """Listen on every one of ``places``, and put into `addresses` where others reach that.

        Raise `AddressInUseError` or `AddressError` when one cannot be listened on.
        """
        for place in places:
            await patches.listen(self.swarm, place)
        self.addresses.put("listening", resolve_wildcards(self.listen_addresses()))

    def leave_addresses(self, gone: Collection[str]) -> int:
        """This machine has other IP addresses now, and no more those that are ``gone``.

        Returns how many connections are cut, since what is sent from there arrives nowhere.
        """
        cut = self._sockets.cut(gone)
        self.addresses.put("listening", resolve_wildcards(self.listen_addresses()))
        return cut

    async def _accept(self, stream: INetStream) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        released = trio.Event()
        self._on_stream(stream, peer, self.path_of(stream), released)
        await released.wait()

    # --- dialling -------------------------------------------------------------------------------------

    async def open(self, peer: PeerId, multiaddr: Multiaddr) -> tuple[INetStream, str]:
        """A new stream to ``peer``, over a connection that is there or else one made at ``multiaddr``.

        Returns it with its path. Several at a time to one address make one connection.
        """
        libp2p_peer = ID.from_string(peer)
        if known := self._live_connections(libp2p_peer):
            # The peer may be at `multiaddr` now and no more at the other end of a connection that is silent.
            with trio.move_on_after(SILENT_KEEPALIVES * self.limits.keepalive):
                try:
                    return await self._open(libp2p_peer)
                except Exception:
                    if not all(connection.is_closed for connection in known):
                        raise
        await self.connect(libp2p_peer, multiaddr)
        return await self._open(libp2p_peer)

    async def _open(self, peer: ID) -> tuple[INetStream, str]:
        stream = await self.new_stream(peer, PROTOCOL)
        return stream, self.path_of(stream)

    async def new_stream(self, peer: ID, protocol: TProtocol) -> INetStream:
        """A new stream over a connection that is there: a live one, direct if there is such a one."""
        there = self.connections(peer)
        if len(there) <= 1:
            return await self.libp2p.new_stream(peer, [protocol])
        live = self._live_connections(peer, direct=True) or self._live_connections(peer) or there
        heard_last = min(live, key=lambda connection: silent_for(connection.muxed_conn))
        try:
            return await self.open_stream_on(heard_last, protocol)
        except MultiselectClientError as exc:
            raise StreamFailure(str(exc)) from exc

    async def discard(self, opened: tuple[INetStream, str]) -> None:
        """Reset a stream that `open` has opened and nobody waits for any more."""
        with contextlib.suppress(Exception):
            await reset(opened[0])

    async def connect(self, peer: ID, multiaddr: Multiaddr, *, direct: bool = False) -> None:
        """Connect to ``peer`` at ``multiaddr`` unless there is a connection, with ``direct`` a direct one.

        One over which nothing has come for some time does not count: the peer may be on another network now.
        """
        while not self._live_connections(peer, direct=direct):
            dialling = self._dials.get(multiaddr)
            if dialling is not None:
                await dialling.wait()
                continue
            done = self._dials[multiaddr] = trio.Event()
            try:
                await self._dial(peer, multiaddr)
            finally:
                del self._dials[multiaddr]
                done.set()

    async def open_direct(self, peer: PeerId) -> tuple[INetStream, str]:
        """A new stream over a direct connection that is there already, and its path.

        Raise `PeerUnreachableError` when there is none.
        """
        libp2p_peer = ID.from_string(peer)
        if self.connections(libp2p_peer, direct=True):
            stream = await self.new_stream(libp2p_peer, PROTOCOL)
            if (path := self.path_of(stream)) != "relayed":
                return stream, path
            await stream.reset()
        raise PeerUnreachableError(f"there is no direct connection to {short(peer)}")

    async def _dial(self, peer: ID, multiaddr: Multiaddr) -> None:
        if is_relayed(multiaddr):
            await self.dial_relayed(peer, multiaddr)
            return
        # Not by way of `connect`: that waits 250 ms for a second address which there is not.
        with trio.fail_after(self.limits.connect_timeout):  # the library waits for Noise forever
            await self.swarm.dial_addr(multiaddr, peer)

    async def dial_raw(self, multiaddr: Multiaddr, source: tuple[str, int] | None = None) -> RawConnection:
        """Bytes to and from ``multiaddr``, nothing proven yet, sent from the local address ``source``."""
        transport = cast(TCP, self.swarm.transport_manager.transport_for_dialing(multiaddr))
        dialling = transport.dial_with_source(multiaddr, source) if source else transport.dial(multiaddr)
        return cast(RawConnection, await dialling)

    async def open_stream_on(self, connection: INetConn, protocol: TProtocol) -> INetStream:
        """A new stream of ``protocol`` over ``connection`` and no other."""
        stream = await connection.new_stream()
        try:
            communicator = MultiselectCommunicator(stream)
            await self.libp2p.multiselect_client.select_one_of([protocol], communicator)
        except BaseException:
            await reset(stream)
            raise
        stream.set_protocol(protocol)
        return stream

    def connections(self, peer: ID, *, direct: bool = False) -> list[INetConn]:
        """Those to ``peer`` that have not been closed; with ``direct`` without the relayed ones."""
        return [
            connection
            for connection in self.swarm.get_connections(peer)
            if not connection.is_closed and (is_direct(connection) or not direct)
        ]

    def _live_connections(self, peer: ID, *, direct: bool = False) -> list[INetConn]:
        """Those of `connections` over which something has come lately, pings at least."""
        return [
            connection
            for connection in self.connections(peer, direct=direct)
            if not is_silent(connection.muxed_conn)
        ]

    def dialled_addresses(self, peer: ID) -> list[Multiaddr]:
        """Where this peer has dialled those direct connections to ``peer`` that are open."""
        return [
            address
            for connection in self.connections(peer, direct=True)
            if is_outbound(connection)
            for address in connection.get_transport_addresses()
        ]

    def supports(self, peer: ID, protocol: TProtocol) -> bool:
        """Whether ``peer`` has said that it speaks ``protocol``."""
        try:
            return protocol in self.libp2p.get_peerstore().get_protocols(peer)
        except PeerStoreError:  # it has said nothing yet
            return False

    def path_of(self, stream: INetStream) -> str:
        """``"direct"``, ``"hole-punched"`` or ``"relayed"``, as in `Stream.path`."""
        connection = self.connection_of(stream)
        if not is_direct(connection):
            return "relayed"
        return "hole-punched" if connection in self.hole_punched else "direct"

    def connection_of(self, stream: INetStream) -> INetConn:
        """The connection that carries ``stream``."""
        return cast(INetConn, cast(NetStream, stream).swarm_conn)

    def listen_addresses(self) -> list[Multiaddr]:
        """What the listening sockets are bound to, wildcards among it."""
        return [address for listener in self.swarm.listeners.values() for address in listener.get_addrs()]


def is_direct(connection: INetConn) -> bool:
    """Whether no relay carries it."""
    return connection.get_connection_type() is not ConnectionType.RELAYED


def is_outbound(connection: INetConn) -> bool:
    """Whether this peer has dialled it."""
    return isinstance(connection, SwarmConn) and connection.direction is Direction.OUTBOUND


def remote_host(connection: INetConn) -> str | None:
    """The IP address at the other end; None for a relayed connection."""
    if not is_direct(connection):
        return None
    remote = connection.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
    return str(remote[0]).removeprefix("::ffff:") if remote else None


async def _no_relay_client(peer: ID, multiaddr: Multiaddr) -> None:
    raise PeerUnreachableError(f"{short(str(peer))} is behind a relay, and this host has no client of relays")
