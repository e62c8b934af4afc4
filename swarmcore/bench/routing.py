"""How long a router takes: to plan from nothing, and again after each change of a large swarm."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from swarmcore.registry.base import SwarmView
from swarmcore.routing.chain import Chain
from swarmcore.routing.costs import CostModel
from swarmcore.routing.health import Ban
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.types import ModelInfo, PeerId, Progress, Rtt, ServerInfo, Span

if TYPE_CHECKING:
    from rich.table import Table

NEIGHBOURS = 8
"""Round trips that each server publishes."""


@attrs.frozen
class PlanningTime:
    """Processor seconds of the planning of one chain, over some rounds."""

    what: str
    median: float
    p95: float
    hops: int
    """Of the last chain."""


@attrs.frozen(kw_only=True)
class RoutingBench:
    """Servers in random places of a square, 150 ms of round trip wide, with the client in the middle."""

    servers: int = 1000
    blocks: int = 80
    longest_span: int = 16
    rounds: int = 100
    seed: int = 0

    def run(self, progress: Progress = lambda what, done, total: None) -> list[PlanningTime]:
        """Measure each in turn. ``progress`` counts the kinds of plans."""
        progress(f"a swarm of {self.servers:,} servers", 0, 0)
        swarm = RandomSwarm(self)
        whole = Span(0, self.blocks)
        router = swarm.router()
        chain = router.plan(swarm.view(), swarm.model, whole)

        def plan() -> Chain:
            nonlocal chain
            chain = router.plan(swarm.view(), swarm.model, whole, tokens=1024)
            return chain

        def from_nothing() -> Chain:
            return swarm.router().plan(swarm.view(), swarm.model, whole, tokens=1024)

        def replace_one() -> Chain:
            lost = swarm.rng.choice(chain.stages)
            where = chain.peers.index(lost.server.peer)
            return router.plan(
                swarm.view(),
                swarm.model,
                lost.span,
                tokens=1024,
                banned={lost.server.peer: Ban(1.0, 1, "gone")},
                after=chain.peers[where - 1] if where else None,
                before=chain.peers[where + 1] if where + 1 < len(chain) else None,
            )

        limited = swarm.router(max_hops=max(len(plan()) - 1, 1))

        def within_hops() -> Chain:
            return limited.plan(swarm.view(), swarm.model, whole, tokens=1024)

        few = max(self.rounds // 10, 3)
        kinds: list[tuple[str, int, Callable[[], None], Callable[[], Chain]]] = [
            ("from nothing", few, lambda: None, from_nothing),
            ("nothing changed", self.rounds, lambda: None, plan),
            ("any server's queue changed", self.rounds, swarm.change_any, plan),
            ("one of the chain changed", self.rounds, lambda: swarm.change_one_of(chain), plan),
            ("one of the chain left", self.rounds, lambda: swarm.drop_one_of(chain), plan),
            ("a round trip was measured", self.rounds, swarm.measure_any, plan),
            ("a replacement for one stage", self.rounds, lambda: None, replace_one),
            ("one hop fewer allowed", few, swarm.change_any, within_hops),
        ]
        measured = []
        for done, kind in enumerate(kinds):
            progress("planning", done, len(kinds))
            measured.append(self._measure(*kind))
        return measured

    def _measure(
        self, what: str, rounds: int, change: Callable[[], None], plan: Callable[[], Chain]
    ) -> PlanningTime:
        seconds = []
        for _ in range(rounds):
            change()
            started = time.process_time()
            chain = plan()
            seconds.append(time.process_time() - started)
        seconds.sort()
        return PlanningTime(what, seconds[rounds // 2], seconds[int(0.95 * rounds)], len(chain))


class RandomSwarm:
    """The swarm of a bench; changes one server at a time, as views of a registry do."""

    def __init__(self, settings: RoutingBench) -> None:
        self.rng = rng = random.Random(settings.seed)
        self.model = ModelInfo("bench", "f" * 64, settings.blocks, 8192)
        numbers = range(settings.servers)
        places = [(rng.random(), rng.random()) for _ in numbers]
        lengths = [min(rng.randint(4, max(settings.longest_span, 4)), settings.blocks) for _ in numbers]
        spans = [Span(start := rng.randint(0, settings.blocks - n), start + n) for n in lengths]
        # As placement would have it: every block is held by someone.
        for block in range(min(settings.blocks, settings.servers)):
            spans[block] = Span(block, min(block + lengths[block], settings.blocks))
        holders = [[n for n in numbers if block in spans[n]] for block in range(settings.blocks)]
        self.measured = {_peer(n): _rtt((0.5, 0.5), places[n]) for n in numbers}
        self._servers: dict[PeerId, ServerInfo] = {}
        self._dropped: ServerInfo | None = None
        self._revision = 0
        for n in numbers:
            after = holders[spans[n].end] if spans[n].end < settings.blocks else []
            pinged = rng.sample(after, min(4 * NEIGHBOURS, len(after)))
            near = sorted(pinged, key=lambda m, here=places[n]: _rtt(here, places[m]))  # type: ignore[misc]
            self._servers[_peer(n)] = ServerInfo(
                peer=_peer(n),
                addresses=(),
                model=self.model,
                span=spans[n],
                cache_tokens=65536,
                cache_tokens_free=rng.randrange(65536),
                decode_rps=1 / (rng.uniform(0.001, 0.01) * len(spans[n])),
                queue_seconds=rng.uniform(0, 0.01),
                rtts=tuple(Rtt(_peer(m), _rtt(places[n], places[m])) for m in near[:NEIGHBOURS]),
            )

    def router(self, *, max_hops: int | None = None) -> LeastLatency:
        costs = CostModel(rtts=self.measured)
        return LeastLatency(random.Random(self.rng.random()), costs=costs, max_hops=max_hops)

    def view(self) -> SwarmView:
        return SwarmView(self._servers, self._revision)

    def change_any(self) -> None:
        self._change(self.rng.choice(list(self._servers)))

    def change_one_of(self, chain: Chain) -> None:
        self._change(self.rng.choice(chain.peers))

    def drop_one_of(self, chain: Chain) -> None:
        """The one that was dropped before comes back."""
        gone = self.rng.choice(chain.peers)
        back, self._dropped = self._dropped, self._servers[gone]
        self._servers = {peer: info for peer, info in self._servers.items() if peer != gone}
        if back is not None:
            self._servers[back.peer] = back
        self._revision += 1

    def measure_any(self) -> None:
        self.measured[self.rng.choice(list(self._servers))] *= self.rng.uniform(0.8, 1.25)

    def _change(self, peer: PeerId) -> None:
        changed = attrs.evolve(self._servers[peer], queue_seconds=self.rng.uniform(0, 0.01))
        self._servers = {**self._servers, peer: changed}
        self._revision += 1


def _peer(number: int) -> PeerId:
    return PeerId(f"12D3Koo{number:045d}")


def _rtt(one: tuple[float, float], other: tuple[float, float]) -> float:
    return 0.002 + 0.15 * float(((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5)


def routing_table(settings: RoutingBench, results: list[PlanningTime]) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title=f"{settings.servers} servers, {settings.blocks} blocks, processor time of one plan")
    table.add_column("")
    for heading in ("median", "p95", "hops"):
        table.add_column(heading, justify="right")
    for result in results:
        times = (f"{seconds * 1000:.1f} ms" for seconds in (result.median, result.p95))
        table.add_row(result.what, *times, str(result.hops))
    return table
