"""The libp2p transport: TCP, Noise and Yamux in a trio thread, our framed streams above them in asyncio."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial

import trio
from libp2p.abc import INetStream
from multiaddr import Multiaddr

from swarmcore.errors import (
    AddressError,
    DeadlineExceededError,
    InputError,
    PeerUnreachableError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.handshake import Handshaker
from swarmcore_transports.libp2p.addresses import AddressManager
from swarmcore_transports.libp2p.dial_ranker import DialRanker
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.mdns import Mdns
from swarmcore_transports.libp2p.multiaddrs import (
    SCHEME,
    host_of,
    listen_multiaddr,
    parse_announced,
    parse_relay,
    to_address,
    to_multiaddr,
)
from swarmcore_transports.libp2p.nat.port_mapping import PortMapper
from swarmcore_transports.libp2p.patches.yamux import SILENT_KEEPALIVES
from swarmcore_transports.libp2p.pipe import StreamPipe
from swarmcore_transports.libp2p.relay.limits import RelayLimits
from swarmcore_transports.libp2p.services import RelayMode, Services
from swarmcore_transports.libp2p.socket_accounting import SocketAccounting
from swarmcore_transports.libp2p.trio_thread import TrioThread
from swarmcore_transports.local_addresses import available

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0


class Libp2pTransport(Transport):
    """Streams over libp2p; addresses are ``libp2p:/ip4/192.0.2.7/tcp/4001/p2p/<peer id>``.

    ``listen_on`` and ``announce`` hold multiaddrs, or ``host:port`` for short; port 0 takes a free one. A
    wildcard host is announced as this machine's own addresses.

    While it listens and is not known to be reachable by everybody, it keeps reservations at up to two circuit
    relays (version 2): at those of ``relays``, addresses of peers, else at connected peers that relay.
    ``relay`` says whether it relays for others, within ``relay_limits``; ``"auto"`` does once everybody is
    known to reach it. With ``upnp`` it asks the router of a LAN on which it listens to let others in. Raise
    `AddressError` when one of ``relays`` is malformed or relayed itself.
    """

    scheme = SCHEME
    default_places = ("/ip4/0.0.0.0/tcp/{port}", "/ip6/::/tcp/{port}")
    finds_neighbours = True

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
        relay: RelayMode = "auto",
        relay_limits: RelayLimits | None = None,
        relays: Sequence[str] = (),
        upnp: bool = True,
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        fixed = [parse_announced(text, identity.peer) for text in announce]
        self._addresses = AddressManager(fixed, self._addresses_changed)
        self._relay_mode = relay
        self._relay_limits = relay_limits
        self._relays = [parse_relay(text) for text in relays]
        self._mdns: Mdns | None = None
        self._dial_ranker = DialRanker()
        self._port_mapper = PortMapper(self._ports_mapped, random.Random()) if upnp else None
        self._host: Host | None = None
        self._services: Services | None = None
        self._thread: TrioThread | None = None
        self._starting = asyncio.Lock()
        self._listening = False
        self._allowed: Collection[PeerId] | None = None
        self._connections = ConnectionManager(self.limits, self._is_stale, lambda: self.resources)
        self._handshaker = Handshaker(self._connections, self.limits)
        self._accounting = SocketAccounting(
            identity.peer,
            lambda: self.resources,
            call_soon_asyncio=self._call_soon_asyncio,
            call_soon_trio=self._call_soon_trio,
            close_idle_connection=self._close_idle_connection,
        )
        self._migrations: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._listening else "open"
        connections = f"{len(self._connections)} connections, {self._connections.idle} idle"
        return f"<Libp2pTransport {short(self.identity.peer)} {state} · {connections}>"

    async def trio_side(self) -> tuple[TrioThread, Host]:
        """The trio side, started on first use."""
        async with self._starting:
            self._check_open()
            if self._thread is None or self._host is None:
                host = Host(
                    self.identity,
                    self.limits,
                    self._addresses,
                    self._stream_arrived,
                    self._direct_connected,
                    self._allows,
                    self._accounting,
                )
                services = Services(
                    host, relay=self._relay_mode, relay_limits=self._relay_limits, relays=self._relays
                )
                thread = TrioThread(
                    partial(host.run, services.run),
                    name=f"libp2p-{self.identity.peer[-6:]}",
                    on_crash=self._crashed,
                )
                await thread.start(_START_SECONDS)
                self._host, self._services, self._thread = host, services, thread
            return self._thread, self._host

    def _call_soon_asyncio(self, function: Callable[[], object]) -> None:
        if self._thread:
            self._thread.call_soon_asyncio(function)

    def _call_soon_trio(self, function: Callable[[], object]) -> None:
        if self._thread:
            self._thread.call_soon_trio(function)

    def _close_idle_connection(self) -> None:
        if self._host:
            self._host.close_idle_connection()

    def _crashed(self, error: SwarmError) -> None:
        logger.error("%r: %s", self, error)
        self._connections.fail_all(error)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._listening:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['/ip4/0.0.0.0/tcp/4001']")
        places = available([listen_multiaddr(text) for text in self.listen_on], host_of)
        thread, host = await self.trio_side()
        self._connections.serve(on_stream)
        await thread.call(host.listen, places, timeout=self.limits.connect_timeout, what="listening")
        self._listening = True
        self._listening_changed()
        return self._announced()

    def _announced(self) -> tuple[Address, ...]:
        return tuple(to_address(own, self.identity.peer) for own in self._addresses.all())

    def _addresses_changed(self) -> None:
        """Called in the trio thread."""
        if self._thread:
            self._thread.call_soon_asyncio(self._announce_addresses)

    def _announce_addresses(self) -> None:
        if self._listening and not self._closed:
            self.on_addresses(self._announced())
            self._listening_changed()

    def _listening_changed(self) -> None:
        listening = self._addresses.of("listening")
        if self._mdns:
            self._mdns.announce(listening)
        if self._port_mapper:
            self._port_mapper.update_listening(listening)

    def _ports_mapped(self, addresses: list[Multiaddr]) -> None:
        if self._thread:
            self._thread.call_soon_trio(self._addresses.put, "mapped", addresses)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._allowed = frozenset(peers)

    def _allows(self, peer: PeerId) -> bool:
        """Called in the trio thread."""
        return self._allowed is None or peer in self._allowed

    def notes(self) -> Sequence[str]:
        if not self._services or not self._listening:
            return ()
        mapping = self._port_mapper.refusal if self._port_mapper else ""
        return [f"{SCHEME}: {note}" for note in self._services.diagnostics(mapping)]

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        return to_address(parse_announced(place, peer), peer)

    async def find_neighbours(self, on_found: Callable[[tuple[Address, ...]], None]) -> None:
        self._check_open()
        if self._mdns:
            raise InputError("this transport looks for neighbours already")
        self._mdns = Mdns(self.identity.peer, on_found)
        await self._mdns.start(self._addresses.of("listening"))

    def preference(self, address: Address) -> int:
        return self._dial_ranker.preference(address, asyncio.get_running_loop().time())

    def _stream_arrived(self, stream: INetStream, peer: PeerId, path: str, released: trio.Event) -> None:
        """Called in the trio thread."""
        assert self._thread
        self._thread.call_soon_asyncio(self._accept, stream, peer, path, released)

    def _accept(self, stream: INetStream, peer: PeerId, path: str, released: trio.Event) -> None:
        pipe = self._pipe(stream, path, released)
        if self._listening and not self._closed:
            self._handshaker.accept(pipe, peer)
        else:
            pipe.abort()

    # --- dialling -------------------------------------------------------------------------------------

    async def open_stream(self, address: Address) -> Stream:
        self._check_open()
        multiaddr = to_multiaddr(address)
        connection = self._connections.take_idle(address.peer)
        if connection is None:
            seconds = self.limits.connect_timeout
            try:
                async with asyncio.timeout(seconds):
                    thread, host = await self.trio_side()
                    stream, path = await thread.call(
                        host.open,
                        address.peer,
                        multiaddr,
                        timeout=seconds,
                        what=f"dialling {multiaddr}",
                        unwanted=host.discard,
                    )
                    connection = await self._handshake(stream, address.peer, path)
            except (TimeoutError, DeadlineExceededError) as exc:
                self._check_open()
                raise PeerUnreachableError(
                    f"{short(address.peer)} at {multiaddr} did not answer within {seconds:g} s"
                ) from exc
        return self._connections.open_stream(connection, address.peer)

    def _is_stale(self, connection: Connection) -> bool:
        if connection.transport is None or connection.transport.is_closing():
            return True
        return connection.silent_for > SILENT_KEEPALIVES * self.limits.keepalive

    async def _handshake(self, stream: INetStream, peer: PeerId, path: str) -> Connection:
        pipe = self._pipe(stream, path, trio.Event())
        try:
            self._check_open()
            return await self._handshaker.dial(pipe, peer)
        except BaseException:
            pipe.abort()
            raise

    # --- leaving relays -------------------------------------------------------------------------------

    def _direct_connected(self, peer: PeerId) -> None:
        """Called in the trio thread when there is a direct connection to a peer that was reached by relay."""
        if self._thread:
            self._thread.call_soon_asyncio(self._migrate_to_direct, peer)

    def _migrate_to_direct(self, peer: PeerId) -> None:
        for connection in self._connections.relayed_to(peer):
            task = asyncio.get_running_loop().create_task(self._migrate(connection, peer))
            self._migrations.add(task)
            task.add_done_callback(self._migrations.discard)

    async def _migrate(self, connection: Connection, peer: PeerId) -> None:
        assert self._thread and self._host
        seconds = self.limits.connect_timeout
        fresh: Connection | None = None
        try:
            async with asyncio.timeout(seconds):
                stream, path = await self._thread.call(
                    self._host.open_direct, peer, timeout=seconds, what="leaving a relay"
                )
                fresh = await self._handshake(stream, peer, path)
                await self._connections.migrate(connection, fresh)
            logger.info("%s is reached directly now: %s", short(peer), path)
        except (TimeoutError, SwarmError) as exc:
            logger.info("%s stays behind its relay: %s", short(peer), exc)
            if fresh:
                fresh.retire("the move took too long")

    # --- both -----------------------------------------------------------------------------------------

    def _pipe(self, stream: INetStream, path: str, released: trio.Event) -> StreamPipe:
        assert self._thread
        return StreamPipe(self._thread, stream, path, released, silence=2 * self.limits.keepalive)

    # --- the end --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this transport is closed")

    async def close(self) -> None:
        self._closed = True
        if self._mdns:
            await self._mdns.close()
        if self._port_mapper:
            await self._port_mapper.close()
        for task in self._migrations:
            task.cancel()
        self._connections.begin_close()
        await self._connections.finish_close(self._migrations)
        async with self._starting:
            if self._thread:
                await self._thread.close()
