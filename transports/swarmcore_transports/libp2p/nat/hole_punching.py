"""Direct connections to peers that are reached through a relay: by dialling, else by hole punching.

Of two peers, the one that was dialled through the relay acts. First it dials the other's public addresses.
Where nothing answers, both tell each other over the relay by which addresses they are seen (DCUtR, libp2p's
specification relay/DCUtR.md), and dial at the same moment, each from the port where it listens: both routers
then take what comes for answers. That needs routers that keep a port for every destination (RFC 5382, REQ-1).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from itertools import islice

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.relay.circuit_v2.dcutr import PROTOCOL_ID as DCUTR
from libp2p.relay.circuit_v2.dcutr import read_dcutr_msg
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.relay.circuit_v2.utils import write_delimited_msg
from multiaddr import Multiaddr

from swarmcore.errors import PeerUnreachableError, ProtocolError
from swarmcore.types import PeerId, short
from swarmcore_transports.libp2p.host import Host, is_direct, is_outbound
from swarmcore_transports.libp2p.multiaddrs import (
    Reach,
    decode_tcp_multiaddr,
    host_of,
    port_of,
    reach,
    tcp_multiaddr,
)
from swarmcore_transports.libp2p.nat.observed_addresses import ObservedAddresses
from swarmcore_transports.libp2p.nat.upgrade_plan import UpgradePlan
from swarmcore_transports.libp2p.patches.host import reset
from swarmcore_transports.libp2p.translation import translated

logger = logging.getLogger(__name__)

MAX_ADDRESSES = 8
"""Most addresses of a peer that are dialled; further ones are ignored."""

_EXCHANGE_SECONDS = 5.0
_ATTEMPT_SECONDS = 12.0
_DIAL_SECONDS = 1.0
_PUNCH_SECONDS = 2.0
_CONNECT_SECONDS = 1.5
"""One try: the kernel sends the first packet again after a second."""

_HANDSHAKE_SECONDS = 1.0
_MAX_TRIES = 10
_RETRY_SECONDS = 0.1
_CLOSE_SECONDS = 1.0

_NOTHING_CAME_THROUGH = (
    "no packet came through: one router takes another port for every destination (symmetric NAT), "
    "or lets nothing in"
)


class HolePuncher:
    """Tries for a direct connection whenever there is only a relayed one. Lives in trio."""

    def __init__(self, host: Host) -> None:
        self.reaches: frozenset[Reach] = frozenset(["public"])
        """Which addresses are exchanged and dialled; those of a LAN are as well behind the same router."""
        self._host = host
        self._upgrades = UpgradePlan()
        self._observed = ObservedAddresses(host)
        self._wake_event = trio.Event()
        self._direct_arrived = trio.Event()
        self._punching: set[ID] = set()
        self._reserved_ports: dict[int, socket.socket] = {}
        self._last_own_addresses: list[Multiaddr] = []

    def __repr__(self) -> str:
        return f"<HolePuncher {self._upgrades!r} · {len(self._host.hole_punched)} punched>"

    def status(self, peer: PeerId) -> str:
        """What is being tried, or why ``peer`` stays relayed; empty when it is not relayed."""
        return self._upgrades.status(peer)

    def failure_reasons(self) -> list[str]:
        """Why peers stay relayed for now, a reason for each."""
        return self._upgrades.failure_reasons()

    async def run(self) -> None:
        """Serve, and try whom it is time to try."""
        self._host.serve(DCUTR, self._respond)
        self._host.events.on_connected.append(self._connected)
        self._host.events.on_disconnected.append(self._disconnected)
        self._host.addresses.subscribe(self._addresses_changed)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._wake_event = trio.Event()
                    for peer in self._upgrades.take_due(trio.current_time()):
                        nursery.start_soon(self._upgrade, ID.from_string(peer))
                    with trio.CancelScope(deadline=self._upgrades.next_change_at()):
                        await self._wake_event.wait()
        finally:
            for kept in self._reserved_ports.values():
                kept.close()

    # --- connections as they come and go --------------------------------------------------------------

    def _connected(self, connection: INetConn) -> None:
        peer = connection.muxed_conn.peer_id
        name = PeerId(str(peer))
        if is_direct(connection):
            if peer in self._punching:
                self._host.hole_punched.add(connection)
            self._upgrades.direct(name)
            self._direct_arrived.set()
            self._direct_arrived = trio.Event()
            if self._relayed(peer) is not None:
                self._host.on_direct(name)
        elif not self._has_direct(peer):
            self._upgrades.relayed(name, trio.current_time())
            self._wake_event.set()

    def _disconnected(self, connection: INetConn) -> None:
        peer = connection.muxed_conn.peer_id
        now = trio.current_time()
        if self._has_direct(peer):
            return
        if self._relayed(peer) is None:
            self._upgrades.disconnected(PeerId(str(peer)), now)
        else:
            self._upgrades.relayed(PeerId(str(peer)), now)
            self._wake_event.set()

    def network_changed(self) -> None:
        """This machine is on another network: try anew whatever has failed."""
        self._upgrades.retry_all(trio.current_time())
        self._wake_event.set()

    def _addresses_changed(self) -> None:
        own = self._own_addresses(self.reaches)
        if own != self._last_own_addresses:
            self._last_own_addresses = own
            self.network_changed()

    def _relayed(self, peer: ID) -> INetConn | None:
        connections = self._host.connections(peer)
        return next((one for one in connections if not is_direct(one)), None)

    def _has_direct(self, peer: ID) -> bool:
        return any(map(is_direct, self._host.connections(peer)))

    async def _direct_arrives(self, peer: ID) -> None:
        while not self._has_direct(peer):
            await self._direct_arrived.wait()

    # --- one attempt ----------------------------------------------------------------------------------

    async def _upgrade(self, peer: ID) -> None:
        """Never raises: what goes wrong becomes the reason why the peer stays relayed."""
        name = PeerId(str(peer))
        reason = _NOTHING_CAME_THROUGH
        relayed = self._relayed(peer)
        try:
            with trio.fail_after(_ATTEMPT_SECONDS):
                if relayed is not None and not self._has_direct(peer):
                    await self._initiate(peer, relayed)
        except trio.TooSlowError:
            reason = "the peer did not answer in time"
        except (StreamFailure, MultiselectClientError):
            reason = "the peer does not speak the protocol for it, DCUtR"
        except Exception as exc:
            reason = translated(exc).message
        now = trio.current_time()
        if self._has_direct(peer):
            self._upgrades.direct(name)
        elif self._upgrades.failed(name, reason, now) and self._relayed(peer) is not None:
            logger.info("%s %s", short(name), self._upgrades.status(name))
        if not self._host.connections(peer):
            self._upgrades.disconnected(name, now)
        self._wake_event.set()

    async def _initiate(self, peer: ID, relayed: INetConn) -> None:
        if await self._dial_directly(peer, self._announced_addresses(peer)):
            return
        if is_outbound(relayed):
            # The peer that was dialled acts, by the specification; two that act would miss each other.
            with trio.move_on_after(_EXCHANGE_SECONDS + _PUNCH_SECONDS):
                await self._direct_arrives(peer)
            return
        own = await self._candidates()
        if not any(reach(address) in self.reaches for address in own):
            raise PeerUnreachableError("no peer says by which address it sees this one from outside")
        stream = await self._host.open_stream_on(relayed, DCUTR)
        try:
            with trio.fail_after(_EXCHANGE_SECONDS):
                asked_at = trio.current_time()
                await _write(stream, HolePunch.CONNECT, own)
                observed = await _read(stream, HolePunch.CONNECT)
                round_trip = trio.current_time() - asked_at
                theirs = self._addresses_to_dial(observed.ObsAddrs, own)
                await _write(stream, HolePunch.SYNC)  # also when there is nothing to dial: the peer may
            await trio.sleep(round_trip / 2)
            if not await self._connect_simultaneously(peer, theirs, responder=True):
                # A symmetric router here is no obstacle where the peer can be dialled after all.
                await self._dial_directly(peer, theirs)
        finally:
            await reset(stream)

    async def _respond(self, stream: INetStream) -> None:
        relayed = self._host.connection_of(stream)
        peer = relayed.muxed_conn.peer_id
        if is_direct(relayed) or peer in self._punching:
            raise ProtocolError("a direct connection is asked for where there is one, or will be")
        with trio.fail_after(2 * _EXCHANGE_SECONDS):
            observed = await _read(stream, HolePunch.CONNECT)
            own = await self._candidates()
            theirs = self._addresses_to_dial(observed.ObsAddrs, own)
            await _write(stream, HolePunch.CONNECT, own)
            await _read(stream, HolePunch.SYNC)
        await self._connect_simultaneously(peer, theirs, responder=False)
        await stream.close()

    # --- dialling -------------------------------------------------------------------------------------

    async def _dial_directly(self, peer: ID, addresses: Sequence[Multiaddr]) -> bool:
        """Dial in the ordinary way; whether there is a direct connection then."""

        async def dial(address: Multiaddr) -> None:
            try:
                await self._host.swarm.dial_addr(address, peer)
                nursery.cancel_scope.cancel()
            except Exception as exc:
                logger.debug("%s does not answer at %s: %r", short(str(peer)), address, exc)

        with trio.move_on_after(_DIAL_SECONDS):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(dial, address)
        return self._has_direct(peer)

    async def _connect_simultaneously(
        self, peer: ID, addresses: Sequence[Multiaddr], *, responder: bool
    ) -> bool:
        """Dial all of ``addresses`` while the peer dials this one; whether a connection came of it.

        Two packets that cross make one connection (RFC 9293, 3.5), of which nobody is the listener:
        ``responder`` says who answers in the handshake instead.
        """
        self._punching.add(peer)
        try:
            with trio.move_on_after(_PUNCH_SECONDS):
                async with trio.open_nursery() as nursery:
                    for address in addresses:
                        nursery.start_soon(self._punch, peer, address, responder)
                    await self._direct_arrives(peer)
                    nursery.cancel_scope.cancel()
        finally:
            self._punching.discard(peer)
        return self._has_direct(peer)

    async def _punch(self, peer: ID, address: Multiaddr, responder: bool) -> None:
        source = self._source_address(address)
        for _ in range(_MAX_TRIES):
            try:
                with trio.fail_after(_CONNECT_SECONDS):
                    raw = await self._host.dial_raw(address, source)
            except Exception as exc:
                logger.debug("nothing came through to %s: %r", address, exc)
                await trio.sleep(_RETRY_SECONDS)
                continue
            # Shielded: the race ends when the connection is there, while this still has to put it away.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _HANDSHAKE_SECONDS):
                try:
                    if responder:
                        muxed = await self._host.swarm.upgrade_inbound_raw_conn(raw, address)
                        if muxed.peer_id != peer:
                            await muxed.close()
                    else:
                        await self._host.swarm.upgrade_outbound_raw_conn(raw, peer)
                    return
                except Exception as exc:
                    logger.debug("no handshake with %s at %s: %r", short(str(peer)), address, exc)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
                await raw.close()
            await trio.sleep(_RETRY_SECONDS)

    # --- addresses ------------------------------------------------------------------------------------

    def _announced_addresses(self, peer: ID) -> list[Multiaddr]:
        """Where ``peer`` says that it listens, as far as its identification has come."""
        peers = self._host.libp2p.get_peerstore()
        known = peers.addrs(peer) if peer in peers.peers_with_addrs() else []
        return _usable_addresses((address.to_bytes() for address in known), self.reaches)

    def _addresses_to_dial(self, observed: Iterable[bytes], own: Sequence[Multiaddr]) -> list[Multiaddr]:
        """Those of ``observed`` to dial: private ones only where the same router is in front of both."""
        observed = list(observed)[: 2 * MAX_ADDRESSES]
        found = _usable_addresses(observed, self.reaches)
        if {host_of(address) for address in found} & {host_of(address) for address in own}:
            found = _usable_addresses(observed, self.reaches | {"lan"})
        return found

    def _own_addresses(self, reaches: frozenset[Reach]) -> list[Multiaddr]:
        own = self._host.addresses
        known = [*own.of("mapped"), *own.of("verified"), *own.of("listening")]
        return [address for address in dict.fromkeys(known) if reach(address) in reaches]

    async def _candidates(self) -> list[Multiaddr]:
        """Where this peer listens, and where it is seen: a router that allows for holes keeps the port."""
        own = self._own_addresses(self.reaches)
        for host in await self._observed.hosts(self.reaches):
            _, port = self._source_address(tcp_multiaddr(host, 1))
            own.append(tcp_multiaddr(host, port))
        own += self._own_addresses(frozenset(["lan"]))
        return list(dict.fromkeys(own))[:MAX_ADDRESSES]

    def _source_address(self, target: Multiaddr) -> tuple[str, int]:
        """From where to dial ``target``: where this peer listens, else a port that is kept for it."""
        version = 6 if ":" in host_of(target) else 4
        for listener in self._host.listen_addresses():
            host = host_of(listener)
            wildcard = host in ("0.0.0.0", "::")
            same_side = (reach(listener) == "loopback") == (reach(target) == "loopback")
            if (":" in host) == (version == 6) and (wildcard or same_side):
                return host, port_of(listener)
        if version not in self._reserved_ports:
            self._reserved_ports[version] = _reserve_port(version)
        host, port = self._reserved_ports[version].getsockname()[:2]
        return str(host), int(port)


def _reserve_port(version: int) -> socket.socket:
    """A free port that stays this process's, and which its own connections may share."""
    kept = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    kept.bind(("::" if version == 6 else "0.0.0.0", 0))
    return kept


def _usable_addresses(observed: Iterable[bytes], reaches: frozenset[Reach]) -> list[Multiaddr]:
    """The TCP addresses among ``observed`` that are within ``reaches``; the rest is ignored."""
    parsed = (decode_tcp_multiaddr(data) for data in observed)
    usable = (address for address in parsed if address and port_of(address) and reach(address) in reaches)
    return list(islice(dict.fromkeys(usable), MAX_ADDRESSES))


async def _write(
    stream: INetStream, kind: HolePunch.Type.ValueType, addresses: Iterable[Multiaddr] = ()
) -> None:
    message = HolePunch(type=kind, ObsAddrs=[address.to_bytes() for address in addresses])
    await write_delimited_msg(stream, message)


async def _read(stream: INetStream, kind: HolePunch.Type.ValueType) -> HolePunch:
    message = await read_dcutr_msg(stream, HolePunch)
    if message.type != kind:
        raise ProtocolError(f"DCUtR: message {message.type} instead of {kind}")
    return message
