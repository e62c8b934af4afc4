"""A simulated network: distances, links of limited rate, and everything that can go wrong with either."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

from swarmcore.errors import ConnectionLostError
from swarmcore.identity import Identity
from swarmcore.sim.hosts import Geography, Host, HostMaker
from swarmcore.sim.stream import Connection, SimStream
from swarmcore.sim.trace import Trace
from swarmcore.sim.traffic import Scale
from swarmcore.sim.transport import SimTransport
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
        self.trace = trace or Trace()
        self.scale = scale or Scale()
        self.handshakes = handshakes
        self._rng = rng
        self._maker = HostMaker(geography, rng)

    def add_host(self, *, megabits: float | None = None) -> Host:
        """A new machine, somewhere."""
        host = self._maker.make(len(self.hosts), megabits=megabits)
        self.hosts.append(host)
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

    def blocked(self, one: Host, other: Host) -> bool:
        """Whether nothing gets through between two hosts."""
        return (
            one.island != other.island or one.hung or other.hung or not one.power or not other.power
        ) and one is not other

    def split(self, *groups: Iterable[Host]) -> None:
        """Cut the network: each of ``groups`` hears only itself, and so do the hosts in none of them.

        Streams across the cut break when either side's keep-alive runs out, unless `heal` comes first.
        """
        for island, group in enumerate(groups, 1):
            for host in group:
                host.island = island
        self._look_for_silence()

    def heal(self) -> None:
        """Undo all cuts; what was under way arrives."""
        for host in self.hosts:
            host.island = 0
        self._resume()

    def hang(self, host: Host) -> None:
        """Stop the process on ``host`` without ending it: whatever it still does is not heard."""
        host.hung = True
        self._look_for_silence()

    def wake(self, host: Host) -> None:
        """Let a hung process go on."""
        host.hung = False
        self._resume()

    def cut_power(self, host: Host) -> None:
        """Kill the process on ``host`` together with its machine: nobody is told."""
        host.power = False
        self._look_for_silence()
        if host.listener is not None:
            host.listener.crash()

    def restore_power(self, host: Host) -> None:
        host.power = True

    def break_connection(self, stream: SimStream) -> None:
        """Both ends of the connection under ``stream`` find it lost."""
        for end in (stream, stream.other):
            end.spoil()
            end.lose(ConnectionLostError(f"the connection to {short(end.remote)} was lost"))

    def break_any_connection(self) -> bool:
        """Lose the connection under a stream drawn from all that are open; False when there is none."""
        busy = [host for host in self.hosts if host.streams]
        if not busy:
            return False
        host = self._rng.choice(busy)
        self.break_connection(self._rng.choice(list(host.streams)))
        return True

    def fall_silent(self, stream: SimStream) -> None:
        """Start the keep-alive of a stream through which nothing passes."""
        loop = asyncio.get_running_loop()
        stream.silent_since = stream.other.silent_since = loop.time()
        loop.call_later(3 * Limits().keepalive, self._give_up, stream, stream.silent_since)

    def _look_for_silence(self) -> None:
        for host in self.hosts:
            for stream in host.streams:
                if stream.silent_since is None and self.blocked(host, stream.far):
                    self.fall_silent(stream)

    def _give_up(self, stream: SimStream, since: float) -> None:
        if stream.silent_since == since:
            self.break_connection(stream)

    def _resume(self) -> None:
        for host in self.hosts:
            for stream in list(host.streams):
                if stream.silent_since is not None and not self.blocked(host, stream.far):
                    stream.silent_since = None
                    stream.other.silent_since = None
                    stream.resume()
                    stream.other.resume()

    # --- what transports and streams ask for ----------------------------------------------------------

    def delivered(self, source: Host, target: Host, message: bytearray) -> None:
        self.trace.message(asyncio.get_running_loop().time(), source.index, target.index, message)

    def keep(self, connection: Connection) -> None:
        """A connection without a stream is free for the next one from the same host."""
        until = asyncio.get_running_loop().time() + KEEP_IDLE
        kept = connection.dialler.idle.setdefault(connection.target.index, [])
        kept.append((until, connection.boot))

    def take(self, dialler: Host, target: Host) -> Connection | None:
        """A connection that was kept, if the process at its other end is still the same."""
        kept = dialler.idle.pop(target.index, None)
        now = asyncio.get_running_loop().time()
        while kept:
            until, boot = kept.pop()
            if until > now and boot == target.boots and target.listener is not None:
                if kept:
                    dialler.idle[target.index] = kept
                return Connection(dialler, target, boot)
        return None

    def __repr__(self) -> str:
        listening = sum(host.listener is not None for host in self.hosts)
        return f"<SimNetwork {len(self.hosts)} hosts {listening} listening>"
