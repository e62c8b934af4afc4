"""A simulated network: distances, links of limited rate, and everything that can go wrong with either."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

from swarmcore.errors import AddressInUseError, ConnectionLostError, PeerUnreachableError, StreamClosedError
from swarmcore.identity import Identity
from swarmcore.rpc.memory_stream import MemoryStream, StreamEnd
from swarmcore.sim.hosts import Geography, Host, HostMaker
from swarmcore.sim.stream import Connection, Scale, SimStream, Wire
from swarmcore.sim.trace import Trace
from swarmcore.testing.memory import InProcessTransport
from swarmcore.transport import Stream
from swarmcore.types import Address, short
from swarmcore.wire.limits import Limits

HANDSHAKES = 3
"""Round trips before the first message on a new connection: TCP, TLS 1.3, proof of the dialler's identity."""

KEEP_IDLE = 60.0
"""Seconds for which a connection without streams is kept."""


class SimNetwork:
    """All hosts, and what passes between them. Every choice comes from ``rng``."""

    def __init__(
        self,
        geography: Geography,
        rng: random.Random,
        *,
        trace: Trace | None = None,
        scale: Scale | None = None,
        handshakes: int = HANDSHAKES,
    ) -> None:
        self.hosts: list[Host] = []
        self.streams: dict[Host, dict[SimStream, None]] = {}
        """The ends of open streams, by the host where they are."""
        self.listeners: dict[Host, SimTransport] = {}
        self.wire = Wire(scale or Scale(), trace or Trace())
        self.handshakes = handshakes
        self._rng = rng
        self._maker = HostMaker(geography, rng)

    def add_host(self, *, megabits: float | None = None) -> Host:
        """A new machine, somewhere."""
        host = self._maker.make(len(self.hosts), megabits=megabits)
        self.hosts.append(host)
        self.streams[host] = {}
        return host

    def transport(
        self, identity: Identity, host: Host, *, listen: bool = True, limits: Limits | None = None
    ) -> SimTransport:
        """The transport of a process that starts on ``host``, which runs one at a time."""
        host.boots += 1
        return SimTransport(identity, network=self, host=host, listen=listen, limits=limits)

    def delay(self, one: Host, other: Host) -> float:
        """Seconds from one host to the other."""
        return self._maker.delay(one, other)

    def host_at(self, address: Address) -> Host | None:
        number = address.location.removeprefix("//")
        if address.scheme != SimTransport.scheme or not number.isdecimal():
            return None
        return self.hosts[int(number)] if int(number) < len(self.hosts) else None

    # --- faults ---------------------------------------------------------------------------------------

    def split(self, *groups: Iterable[Host]) -> None:
        """Cut the network: each of ``groups`` hears only itself, and so do the hosts in none of them.

        Streams across the cut break when either side's keep-alive runs out, unless `heal` comes first.
        """
        for island, group in enumerate(groups, 1):
            for host in group:
                host.island = island
        self._check_silence()

    def heal(self) -> None:
        """Undo all cuts; what was under way arrives."""
        for host in self.hosts:
            host.island = 0
        self._resume()

    def hang(self, host: Host) -> None:
        """Stop the process on ``host`` without ending it: whatever it still does is not heard."""
        host.hung = True
        self._check_silence()

    def wake(self, host: Host) -> None:
        """Let a hung process go on."""
        host.hung = False
        self._resume()

    def cut_power(self, host: Host) -> None:
        """Kill the process on ``host`` together with its machine: nobody is told."""
        host.power = False
        self._check_silence()
        if (listener := self.listeners.get(host)) is not None:
            listener.kill()

    def restore_power(self, host: Host) -> None:
        host.power = True

    def break_connection(self, stream: SimStream) -> None:
        """Both ends of the connection under ``stream`` find it lost."""
        for end in (stream, stream.other):
            end.mark_broken()
            end.lose(ConnectionLostError(f"the connection to {short(end.remote)} was lost"))

    def break_any_connection(self) -> bool:
        """Lose the connection under a stream drawn from all that are open; False when there is none."""
        busy = [streams for streams in self.streams.values() if streams]
        if not busy:
            return False
        self.break_connection(self._rng.choice(list(self._rng.choice(busy))))
        return True

    def start_keepalive(self, stream: SimStream) -> None:
        """Start the keep-alive of a stream through which nothing passes."""
        loop = asyncio.get_running_loop()
        stream.silent_since = stream.other.silent_since = loop.time()
        loop.call_later(3 * Limits().keepalive, self._give_up, stream, stream.silent_since)

    def _check_silence(self) -> None:
        for host, streams in self.streams.items():
            for stream in streams:
                if stream.silent_since is None and not host.hears(stream.far):
                    self.start_keepalive(stream)

    def _give_up(self, stream: SimStream, since: float) -> None:
        if stream.silent_since == since:
            self.break_connection(stream)

    def _resume(self) -> None:
        for host, streams in self.streams.items():
            for stream in list(streams):
                if stream.silent_since is not None and host.hears(stream.far):
                    stream.silent_since = None
                    stream.other.silent_since = None
                    stream.resume()
                    stream.other.resume()

    # --- connections ----------------------------------------------------------------------------------

    def connection(self, dialler: Host, target: Host, boot: int) -> Connection:
        """A new one, to the process that is started on ``target`` for the ``boot``-th time."""
        return Connection(partial(self._keep, dialler, target, boot))

    def _keep(self, dialler: Host, target: Host, boot: int) -> None:
        """A connection without a stream is free for the next one from the same host."""
        until = asyncio.get_running_loop().time() + KEEP_IDLE
        dialler.idle.setdefault(target.index, []).append((until, boot))

    def take(self, dialler: Host, target: Host) -> Connection | None:
        """A connection that was kept, if the process at its other end is still the same."""
        kept = dialler.idle.pop(target.index, None)
        now = asyncio.get_running_loop().time()
        while kept:
            until, boot = kept.pop()
            if until > now and boot == target.boots and target in self.listeners:
                if kept:
                    dialler.idle[target.index] = kept
                return self.connection(dialler, target, boot)
        return None

    def __repr__(self) -> str:
        return f"<SimNetwork {len(self.hosts)} hosts {len(self.listeners)} listening>"


class SimTransport(InProcessTransport):
    """Connects the hosts of one `SimNetwork`. Addresses are ``sim://<host number>/<peer id>``.

    The first stream to a host waits for the handshakes of a TCP and TLS connection; a later one takes over a
    connection that a stream before it has left, if there is one.
    """

    scheme: ClassVar[str] = "sim"

    def __init__(
        self,
        identity: Identity,
        *,
        network: SimNetwork,
        host: Host,
        limits: Limits | None = None,
        listen: bool = True,
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=(str(host.index),) if listen else ())
        self.network = network
        self.host = host
        self.streams = network.streams[host]

    def _settle(self, places: Sequence[str]) -> None:
        if self.network.listeners.setdefault(self.host, self) is not self:
            raise AddressInUseError(f"a process listens on host {self.host.index} already")

    def _leave(self) -> None:
        if self.network.listeners.get(self.host) is self:
            del self.network.listeners[self.host]

    async def open_stream(self, address: Address) -> Stream:
        await asyncio.sleep(0)
        network, host = self.network, self.host
        target = network.host_at(address)
        if target is None:
            raise PeerUnreachableError(f"{address} is no place on this network")
        link = network.take(host, target) or await self._dial(address, target)
        listener = self._checked(network.listeners.get(target), address)
        near_end = StreamEnd(self.identity.peer, self.limits, self.streams)
        far_end = StreamEnd(address.peer, listener.limits, listener.streams)
        wire, delay = network.wire, network.delay(host, target)
        near = SimStream(near_end, address.peer, host, target, link, wire, delay, self.accept)
        far = SimStream(far_end, self.identity.peer, target, host, link, wire, delay, listener.accept)
        near.connect(far)
        if not host.hears(target):
            network.start_keepalive(near)
        near.signal_open()
        return near

    async def _dial(self, address: Address, target: Host) -> Connection:
        network = self.network
        if not self.host.hears(target):
            await asyncio.sleep(self.limits.connect_timeout)
            raise PeerUnreachableError(f"{address} did not answer")
        round_trip = 2 * network.delay(self.host, target)
        if target not in network.listeners:
            await asyncio.sleep(round_trip)
            raise PeerUnreachableError(f"nobody listens on {address}")
        boot = target.boots
        await asyncio.sleep(network.handshakes * round_trip)
        if not self.host.hears(target):
            await asyncio.sleep(self.limits.connect_timeout)
            raise PeerUnreachableError(f"{address} fell silent")
        if target.boots != boot or target not in network.listeners:
            raise PeerUnreachableError(f"{address} went away")
        return network.connection(self.host, target, boot)

    def accept(self, stream: MemoryStream) -> None:
        if self._closed and isinstance(stream, SimStream):
            stream.mark_broken()
        super().accept(stream)

    def kill(self) -> None:
        """End like a killed process: the other ends see `ConnectionLostError` as soon as they hear of it.

        With the power of the machine gone nobody tells them: they learn from the silence.
        """
        self._closed = True
        self._leave()
        here = StreamClosedError("this process was killed")
        there = ConnectionLostError(f"the connection to {short(self.identity.peer)} was lost")
        for stream in list(self.network.streams[self.host]):
            stream.mark_broken()
            if self.host.power:
                stream.drop(here, there)
            else:
                stream.lose(here)
        self._handlers.cancel()
