"""Decisions to move, of one server and of many that see each other late."""

import heapq
import random

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcore.placement.best_moves import best_moves
from swarmcore.placement.choice import join_span
from swarmcore.placement.rebalance import MoveCost, Rebalancer, look_delay
from swarmcore.placement.swarm_throughput import (
    Placement,
    block_throughputs,
    mean_throughput,
    placements,
    unique_blocks,
)
from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

MODEL = ModelInfo("tiny", "f" * 32, blocks=12, hidden_size=8)
CHEAP = MoveCost(seconds_per_block=0.1)


def server(peer: str, blocks: str, throughput: float = 10.0, **fields) -> ServerInfo:
    return ServerInfo(PeerId(peer), (), model=MODEL, span=Span.parse(blocks), throughput=throughput, **fields)


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView({s.peer: s for s in servers})


def rebalancer(peer: str, **options) -> Rebalancer:
    return Rebalancer(PeerId(peer), random.Random(0), **options)


def look(me: ServerInfo, *others: ServerInfo, cost: MoveCost = CHEAP, **options):
    return rebalancer(me.peer, **options).look(view(me, *others), me, cost)


def test_a_server_among_too_many_moves_to_where_nobody_is():
    decision = look(server("a", "0:6"), server("b", "0:6"))
    assert decision.target == Span(6, 12)
    assert str(decision).startswith("moving from 0:6 to 6:12: the swarm runs at 0 % of what moves could give")


@pytest.mark.parametrize(
    ("me", "others", "reason"),
    [
        ("0:12", ["0:6"], "staying: it holds the whole model"),
        ("0:6", ["6:12"], "staying: nobody else holds blocks 0:6"),
        ("6:12", ["0:6", "0:6", "0:12"], "staying: of all spans the swarm needs 6:12 most"),
        (
            "0:6",
            ["1:7", "6:12"],
            "staying: of all spans that keep 0:1, which nobody else holds, the swarm needs 0:6 most",
        ),
        ("0:6", ["0:6"] * 4 + ["6:12"] * 3, "staying: the swarm runs at 75 % of its throughput or more"),
    ],
)
def test_a_server_stays_and_says_why(me, others, reason):
    decision = look(server("a", me), *(server(f"b{i}", span) for i, span in enumerate(others)))
    assert decision.target is None
    assert decision.reason.startswith(reason)


def test_the_quality_asked_for_decides():
    servers = [server("a", "0:6"), *(server(f"b{i}", "0:6") for i in range(5))]
    servers += [server(f"c{i}", "6:12") for i in range(4)]
    assert look(*servers, balance_quality=0.75).target is None
    assert look(*servers, balance_quality=0.9).target == Span(6, 12)


def test_a_move_that_costs_more_than_it_gains_is_not_made():
    crowd = [server("a", "0:6"), server("b", "0:6"), server("c", "0:6"), server("d", "6:12")]
    assert look(*crowd).target == Span(6, 12)
    decision = look(*crowd, cost=MoveCost(seconds_per_block=0.1, cached_tokens=100_000))
    assert decision.target is None
    assert "but to move to 6:12 would gain 6,000 tokens in 600 s, cost 50,003" in decision.reason
    slow = look(*crowd, cost=MoveCost(seconds_per_block=1000.0))
    assert slow.target is None


def test_a_partial_move_keeps_what_nobody_else_holds():
    decision = look(server("a", "0:6"), server("b", "2:6"), server("c", "3:9", 1.0))
    assert decision.target is None or 0 in decision.target
    decision = look(server("a", "2:8"), server("b", "0:6"), server("c", "0:6"))
    assert decision.target == Span(6, 12)


def test_of_two_with_the_same_idea_the_lower_id_yields():
    a, b, c = server("a", "0:6"), server("b", "0:6"), server("c", "0:6")
    deciders = {s.peer: rebalancer(s.peer) for s in (a, b)}
    looked = view(a, b, c)
    for s in (a, b):
        assert deciders[s.peer].look(looked, s, CHEAP).target == Span(6, 12)
    a, b = (attrs.evolve(s, target=Span(6, 12)) for s in (a, b))
    fresh = view(a, b, c)
    assert deciders[a.peer].confirm(fresh, a, Span(6, 12), CHEAP).target is None
    assert deciders[b.peer].confirm(fresh, b, Span(6, 12), CHEAP).target == Span(6, 12)


def test_who_was_moving_before_the_look_is_not_asked_to_yield():
    a, b, c = server("a", "0:6", target=Span(6, 12)), server("b", "0:6"), server("c", "0:6")
    assert look(b, a, c).target is None


def test_a_block_that_two_would_leave_is_left_by_neither():
    a, b = server("a", "0:6", target=Span(6, 12)), server("b", "0:6")
    decider = rebalancer("b")
    decider.look(view(attrs.evolve(a, target=None), b), b, CHEAP)
    b = attrs.evolve(b, target=Span(6, 12))
    assert decider.confirm(view(a, b), b, Span(6, 12), CHEAP).reason == (
        "staying: nobody else would be left to hold blocks 0:6"
    )


def test_best_moves_of_a_small_swarm_are_the_best_there_are():
    placed = [Placement(PeerId(name), Span(0, 4), 10.0) for name in "abc"]
    assert best_moves(placed, 12).throughput == 10.0
    assert len(best_moves(placed, 12).moved) == 2


sizes_and_speeds = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6), st.integers(1, 40)), max_size=15)


@given(sizes_and_speeds)
def test_best_moves_never_lose_and_are_stable(drawn):
    placed = [
        Placement(PeerId(f"{i:02}"), Span(min(start, 12 - size), min(start, 12 - size) + size), float(speed))
        for i, (start, size, speed) in enumerate(drawn)
    ]
    found = best_moves(placed, 12)
    assert min(block_throughputs(placed, 12)) <= found.throughput <= mean_throughput(placed, 12)


@given(sizes_and_speeds, st.integers(0, 2**32))
def test_no_decision_reloads_a_span_or_leaves_a_block_without_holder(drawn, seed):
    servers = [
        server(f"{i:02}", f"{min(start, 12 - size)}:{min(start, 12 - size) + size}", float(speed))
        for i, (start, size, speed) in enumerate(drawn)
    ]
    swarm = view(*servers)
    for me in servers:
        target = Rebalancer(me.peer, random.Random(seed), balance_quality=1.0).look(swarm, me, CHEAP).target
        if target is None:
            continue
        assert target != me.span
        assert len(target) == len(me.span)
        alone = unique_blocks(swarm, me)
        assert alone is None or target.start <= alone.start < alone.end <= target.end
        after = view(*(attrs.evolve(s, target=target) if s is me else s for s in servers))
        before, then = (sorted(block_throughputs(placements(v, MODEL), 12)) for v in (swarm, after))
        assert then > before


class StaleSwarm:
    """Servers that decide on views ``delay`` seconds old: looks, announcements, settling pauses, loading."""

    def __init__(self, servers: list[ServerInfo], rng: random.Random, *, delay: float, settle: float) -> None:
        self.now = 0.0
        self.moves: list[tuple[float, PeerId]] = []
        self.unheld = 0
        self._rng, self._delay, self._settle = rng, delay, settle
        self._history = {s.peer: [(-1e9, s)] for s in servers}
        self._deciders = {s.peer: Rebalancer(s.peer, rng) for s in servers}
        self._events = [(rng.uniform(0, 120), s.peer, "look", None) for s in servers]
        heapq.heapify(self._events)

    def current(self, peer: PeerId) -> ServerInfo:
        return self._history[peer][-1][1]

    def truth(self) -> SwarmView:
        return SwarmView({peer: self.current(peer) for peer in self._history})

    def held(self) -> list[bool]:
        spans = [s.span for s in self.truth() if s.state == "online" and s.span]
        return [any(block in span for span in spans) for block in range(MODEL.blocks)]

    def quality(self) -> float:
        placed = placements(self.truth(), MODEL)
        return min(block_throughputs(placed, MODEL.blocks)) / best_moves(placed, MODEL.blocks).throughput

    def run(self, until: float) -> None:
        while self._events[0][0] < until:
            self.now, peer, step, target = heapq.heappop(self._events)
            before = self.held()
            getattr(self, f"_{step}")(peer, target)
            self.unheld += sum(was and not is_ for was, is_ in zip(before, self.held(), strict=True))

    def _look(self, peer: PeerId, _: None) -> None:
        self._later(look_delay(120.0, self._rng), peer, "look")
        me = self.current(peer)
        if me.target is None and me.state == "online":
            target = self._deciders[peer].look(self._seen(peer), me, CHEAP).target
            if target is not None:
                self._announce(peer, target=target)
                self._later(self._settle, peer, "confirm", target)

    def _confirm(self, peer: PeerId, target: Span) -> None:
        me = self.current(peer)
        if self._deciders[peer].confirm(self._seen(peer), me, target, CHEAP).target is None:
            self._announce(peer, target=None)
            return
        staying = Span(max(me.span.start, target.start), min(me.span.end, target.end))
        if staying.start < staying.end:
            self._announce(peer, span=staying)
        else:
            self._announce(peer, span=target, target=None, state="joining")
        self._later(5.0, peer, "arrive", target)

    def _arrive(self, peer: PeerId, target: Span) -> None:
        self.moves.append((self.now, peer))
        self._announce(peer, span=target, target=None, state="online")

    def _later(self, seconds: float, peer: PeerId, step: str, target: Span | None = None) -> None:
        heapq.heappush(self._events, (self.now + seconds, peer, step, target))

    def _announce(self, peer: PeerId, **changes) -> None:
        self._history[peer].append((self.now, attrs.evolve(self.current(peer), **changes)))

    def _seen(self, observer: PeerId) -> SwarmView:
        """Everyone as they were up to ``delay`` seconds ago, each somewhat differently; oneself as one is."""
        seen = {}
        for peer, history in self._history.items():
            horizon = self.now - (0.0 if peer == observer else self._rng.uniform(0, self._delay))
            seen[peer] = next(info for at, info in reversed(history) if at <= horizon)
        return SwarmView(seen)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), count=st.integers(2, 24), crowded=st.booleans(), delay=st.sampled_from([0, 2])
)
def test_servers_with_stale_views_settle_and_leave_no_block(seed, count, crowded, delay):
    rng = random.Random(seed)
    servers = []
    for i in range(count):
        size = rng.randint(2, 8)
        start = 0 if crowded else rng.randint(0, 12 - size)
        servers.append(server(f"{i:03}", f"{start}:{start + size}", rng.choice([5.0, 10.0, 20.0])))
    swarm = StaleSwarm(servers, rng, delay=delay, settle=5.0)
    swarm.run(until=3600)
    assert swarm.unheld == 0
    settled = len(swarm.moves)
    assert settled <= 2 * count
    swarm.run(until=5400)
    assert len(swarm.moves) == settled, "servers still move in a swarm where nothing happens"


def test_a_third_of_a_swarm_dies_and_the_rest_closes_the_gap():
    rng = random.Random(1)
    servers: list[ServerInfo] = []
    for i in range(60):
        span = join_span(view(*servers), MODEL, 4, rng, peer=PeerId(f"{i:03}"))
        servers.append(server(f"{i:03}", str(span), rng.uniform(5, 20)))
    survivors = [s for s in servers if s.span and not s.span.start < 5 < s.span.end][:40]
    swarm = StaleSwarm(survivors, rng, delay=2, settle=5.0)
    assert swarm.quality() < 0.75
    swarm.run(until=1800)
    assert swarm.quality() >= 0.75
    assert swarm.unheld == 0
    assert len(swarm.moves) < 20
