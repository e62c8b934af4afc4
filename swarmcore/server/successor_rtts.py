"""Round trips from a server to those that may follow it in a chain, for its announcement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import attrs

from swarmcore.errors import SwarmError
from swarmcore.pacing import jittered
from swarmcore.registry.base import SwarmView
from swarmcore.routing.costs import Latencies
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import in_turns, measure_round_trip
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import ModelInfo, PeerId, Rtt, ServerInfo, Span


@attrs.frozen(kw_only=True)
class SuccessorRttLimits:
    published: int = 8
    """Round trips announced: those to the nearest successors."""
    pinged: int = 16
    """Most servers pinged in a round: the ones announced, and others in turn."""
    at_once: int = 4
    round: float = 60.0
    """Seconds between two rounds, more or less."""
    refresh: float = 600.0
    """Seconds for which a measurement is good."""
    timeout: float = 5.0
    change: float = 0.2
    """Part by which a round trip has to differ from what is announced to be announced anew,"""
    least_change: float = 0.002
    """and seconds: on a local network the times of the machines vary more than those of the network."""


@attrs.define(eq=False, repr=False)
class SuccessorRtts:
    """Measures round trips to servers that hold the block after this server's last one.

    ``span`` gives the blocks that it serves now. `rtts` is what to announce; it stays the same until
    something has changed that is worth the traffic.
    """

    _node: Node
    _view: Callable[[], SwarmView]
    _model: ModelInfo
    _span: Callable[[], Span]
    _rng: Random = attrs.field(kw_only=True)
    _limits: SuccessorRttLimits = attrs.field(factory=SuccessorRttLimits, kw_only=True)
    rtts: tuple[Rtt, ...] = attrs.field(default=(), init=False)
    """Round trips to the nearest of those that may follow, nearest first."""
    _latencies: Latencies = attrs.field(factory=Latencies, init=False)
    _tasks: BackgroundTasks = attrs.field(factory=BackgroundTasks, init=False)

    def __repr__(self) -> str:
        return f"<SuccessorRtts {len(self.rtts)} announced of {len(self._latencies)} measured>"

    def start(self) -> None:
        self._tasks.start(self._run(), "round trips to successors")

    async def close(self) -> None:
        """Stop. Harmless when repeated."""
        await self._tasks.close()

    async def _run(self) -> None:
        while True:
            successors = self._successors()
            await in_turns(self._next(successors), self._ping, at_once=self._limits.at_once)
            self.rtts = self._worth_announcing(successors)
            await asyncio.sleep(jittered(self._limits.round, self._rng))

    def _successors(self) -> list[ServerInfo]:
        end = self._span().end
        return [
            server
            for server in self._view().serving(self._model.fingerprint)
            if server.state == "online"
            and server.addresses
            and server.peer != self._node.peer
            and server.span is not None
            and end in server.span
        ]

    def _next(self, successors: list[ServerInfo]) -> list[ServerInfo]:
        """Those that are due: the ones announced, then those not measured for the longest time."""
        now = asyncio.get_running_loop().time()
        announced = {rtt.peer for rtt in self.rtts}
        # Spread over a fifth of the time, so that not all come due at once.
        due = [
            server
            for server in successors
            if self._latencies.age(server.peer, now) > self._limits.refresh * self._rng.uniform(0.8, 1.0)
        ]
        self._rng.shuffle(due)
        due.sort(key=lambda server: -self._latencies.age(server.peer, now))
        due.sort(key=lambda server: server.peer not in announced)
        return due[: self._limits.pinged]

    async def _ping(self, server: ServerInfo) -> None:
        try:
            seconds = await measure_round_trip(
                self._node,
                server,
                timeout=self._limits.timeout,
                known=self._latencies.seconds.get(server.peer),
            )
        except SwarmError:
            self._latencies.forget(server.peer)
        else:
            self._latencies.measured(server.peer, seconds, asyncio.get_running_loop().time())

    def _worth_announcing(self, successors: list[ServerInfo]) -> tuple[Rtt, ...]:
        known: dict[PeerId, float] = {
            server.peer: self._latencies.seconds[server.peer]
            for server in successors
            if server.peer in self._latencies.seconds
        }
        announced = {rtt.peer: rtt.seconds for rtt in self.rtts}

        def margin(peer: PeerId) -> float:
            return max(self._limits.change * announced.get(peer, 0.0), self._limits.least_change)

        # One that is announced stays unless another is clearly nearer.
        ranked = sorted(known, key=lambda peer: known[peer] - (margin(peer) if peer in announced else 0.0))
        nearest = ranked[: self._limits.published]
        if set(nearest) == set(announced) and all(
            abs(known[peer] - announced[peer]) <= margin(peer) for peer in nearest
        ):
            return self.rtts
        return tuple(Rtt(peer, round(known[peer], 5)) for peer in sorted(nearest, key=known.__getitem__))
