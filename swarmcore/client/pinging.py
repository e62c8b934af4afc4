"""Measures a client's round trips to the servers of the models that it uses, the most promising first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

import attrs

from swarmcore.errors import InputError, SwarmError
from swarmcore.pacing import jittered
from swarmcore.registry.base import SwarmView
from swarmcore.routing.costs import CostModel, Latencies
from swarmcore.routing.health import PeerHealth
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import in_turns, measure_round_trip
from swarmcore.tasks import BackgroundTasks, wait_until_set
from swarmcore.types import ModelInfo, PeerId, ServerInfo


@attrs.frozen(kw_only=True)
class PingLimits:
    """How much is spent on knowing who is near."""

    servers: int = 64
    """Pinged in one round for each model; 0 for nobody ever."""
    for_each_block: int = 8
    """A server is left out where so many better ones hold each of its blocks."""
    at_once: int = 8
    round: float = 15.0
    """Seconds between two rounds, more or less; new servers are pinged in the next."""
    refresh: float = 60.0
    """Seconds for which a measurement is good, and for which a server that does not answer is left alone."""
    timeout: float = 5.0
    idle: float = 300.0
    """Seconds without use after which nobody is pinged for a model, until it is used again."""


class Pinger:
    """Pings servers of the models in use while it is open. A lost ping is only a mild sign of illness.

    ``view`` gives the swarm as it is known now; ``admits`` says which servers may be used at all.
    """

    def __init__(
        self,
        node: Node,
        view: Callable[[], SwarmView],
        latencies: Latencies,
        health: PeerHealth,
        *,
        rng: Random,
        admits: Callable[[PeerId], bool] = lambda peer: True,
        limits: PingLimits | None = None,
    ) -> None:
        self._node = node
        self._view = view
        self._latencies = latencies
        self._health = health
        self._rng = rng
        self._admits = admits
        self._limits = limits or PingLimits()
        self._first_rounds: dict[str, asyncio.Event] = {}
        self._used: dict[str, float] = {}
        self._tried: dict[PeerId, float] = {}
        self._wake = asyncio.Event()
        self._tasks = BackgroundTasks()

    def __repr__(self) -> str:
        return f"<Pinger of {len(self._first_rounds)} models, {len(self._latencies)} peers measured>"

    def start(self) -> None:
        if self._limits.servers:
            self._tasks.start(self._run(), "pinger")

    async def close(self) -> None:
        """Stop. Harmless when repeated."""
        await self._tasks.close()

    async def follow(self, model: ModelInfo, *, timeout: float = 1.0) -> None:
        """Ping servers of ``model`` from now on; wait until the first round is over, ``timeout`` at most.

        It goes on while the model is `used`.
        """
        if not len(self._tasks):
            return
        self.used(model)
        if model.fingerprint not in self._first_rounds:
            self._first_rounds[model.fingerprint] = asyncio.Event()
            self._wake.set()
        # Those that have not answered by then are not the nearest.
        await wait_until_set(self._first_rounds[model.fingerprint], timeout)

    def used(self, model: ModelInfo) -> None:
        """Sessions of the model are at work."""
        self._used[model.fingerprint] = asyncio.get_running_loop().time()

    async def _run(self) -> None:
        while True:
            self._drop_idle()
            if not self._first_rounds:
                await self._wake.wait()
            self._wake.clear()
            following = dict(self._first_rounds)
            await in_turns(self._due(following), self._ping, at_once=self._limits.at_once)
            for event in following.values():
                event.set()
            await wait_until_set(self._wake, jittered(self._limits.round, self._rng))

    def _drop_idle(self) -> None:
        before = asyncio.get_running_loop().time() - self._limits.idle
        for fingerprint in [each for each, used in self._used.items() if used < before]:
            del self._used[fingerprint]
            self._first_rounds.pop(fingerprint, None)

    def _due(self, fingerprints: Iterable[str]) -> list[ServerInfo]:
        now = asyncio.get_running_loop().time()
        view = self._view()
        self._tried = {peer: at for peer, at in self._tried.items() if peer in view.servers}
        due = []
        for fingerprint in fingerprints:
            online = [
                server
                for server in view.serving(fingerprint)
                if server.state == "online" and server.addresses and self._admits(server.peer)
            ]
            for server in most_promising(online, self._latencies, self._limits):
                # Spread over a fifth of the time, so that not all come due at once.
                age = min(
                    self._latencies.age(server.peer, now), now - self._tried.get(server.peer, float("-inf"))
                )
                if age > self._limits.refresh * self._rng.uniform(0.8, 1.0):
                    due.append(server)
        return due

    async def _ping(self, server: ServerInfo) -> None:
        loop = asyncio.get_running_loop()
        self._tried[server.peer] = loop.time()
        try:
            seconds = await measure_round_trip(
                self._node,
                server,
                timeout=self._limits.timeout,
                known=self._latencies.seconds.get(server.peer),
            )
        except InputError:
            return  # no transport in common, or not on its list: no fault of its own
        except SwarmError as exc:
            self._health.missed(server.peer, loop.time(), exc.message)
            return
        self._latencies.measured(server.peer, seconds, loop.time())
        self._health.answered(server.peer)


def most_promising(
    servers: Iterable[ServerInfo], latencies: Latencies, limits: PingLimits
) -> list[ServerInfo]:
    """Those of ``servers`` that are likeliest to be in a good chain, best first.

    One that was never measured is taken to be near, so that each is tried once.
    """
    servers = list(servers)
    costs = CostModel(rtts=latencies.seconds, default_rtt=0.0)
    typical = costs.typical_block_seconds(servers, "decode")

    def seconds_a_block(server: ServerInfo) -> float:
        assert server.span is not None
        entering = costs.rtt(server.peer) + server.queue_seconds
        return entering / len(server.span) + costs.block_seconds(server, "decode", typical)

    chosen: list[ServerInfo] = []
    holders: Counter[int] = Counter()
    for server in sorted((s for s in servers if s.span), key=seconds_a_block):
        assert server.span is not None
        if any(holders[block] < limits.for_each_block for block in server.span):
            holders.update(server.span)
            chosen.append(server)
        if len(chosen) == limits.servers:
            break
    return chosen
