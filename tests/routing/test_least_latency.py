"""Least latency: the chain it plans is the cheapest of all chains, whatever is known, banned or blocked."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from random import Random
from typing import Any

import attrs
import pytest
from announced import MODEL, WHOLE, peer, random_server, rtts, server, view
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcore.errors import InputError, MissingBlocksError, ModelMismatchError
from swarmcore.registry.base import SwarmView
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.costs import CostModel
from swarmcore.routing.health import Ban
from swarmcore.routing.least_latency import TIE, LeastLatency
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span


def router(rtt: dict[int, float] | None = None, seed: int = 0, **options: Any) -> LeastLatency:
    costs = CostModel(rtts={peer(n): seconds for n, seconds in (rtt or {}).items()})
    return LeastLatency(random.Random(seed), costs=costs, **options)


def text(chain: Chain) -> list[str]:
    return [f"{stage.server.peer} {stage.span}" for stage in chain.stages]


chances = st.builds(Random, st.integers(0, 2**32 - 1))
"""A seed each: `st.randoms` asks hypothesis for every number, which takes most of the time."""


# --- against all chains there are ------------------------------------------------------------------------


def all_chains(servers: Collection[ServerInfo], span: Span, last: PeerId | None = None) -> Iterator[Chain]:
    if not len(span):
        yield Chain(())
    for info in servers:
        if info.peer != last and info.span and span.start in info.span:
            for end in range(span.start + 1, min(info.span.end, span.end) + 1):
                stage = Stage(info, Span(span.start, end))
                for rest in all_chains(servers, Span(end, span.end), info.peer):
                    yield Chain((stage, *rest.stages))


def seconds(planner: LeastLatency, swarm: SwarmView, model: ModelInfo, chain: Chain, **ends: Any) -> float:
    """What a chain costs, with the waits for room in the caches."""
    tokens = ends.pop("tokens", 0)
    waits = sum(planner.costs.room(stage.server, tokens) for stage in chain.stages)
    return planner.cost(swarm, model, chain, **ends).seconds + waits


@given(chances, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_no_chain_is_cheaper_than_the_one_planned(rng: Random, count: int, blocks: int) -> None:
    model = attrs.evolve(MODEL, blocks=blocks)
    swarm = view(*(random_server(rng, n, blocks, range(count + 2)) for n in range(count + 2)))
    planner = router({n: rng.uniform(0.001, 0.3) for n in range(count) if rng.random() < 0.7})
    planner.max_hops = rng.choice([None, None, 1, 2, 3])
    start = rng.randrange(blocks)
    span = Span(start, rng.randint(start + 1, blocks))
    ends = {end: rng.choice([None, peer(count), peer(count + 1), peer(99)]) for end in ("after", "before")}
    tokens = rng.choice([0, 100])
    blocked = [peer(n) for n in range(count) if rng.random() < 0.1]
    usable = [s for s in swarm if s.state == "online" and s.peer not in blocked]
    costs = [
        seconds(planner, swarm, model, chain, tokens=tokens, **ends)
        for chain in all_chains(usable, span)
        if len(chain) <= (planner.max_hops or blocks)
    ]
    if not costs:
        with pytest.raises(MissingBlocksError):
            planner.plan(swarm, model, span, tokens=tokens, blocked=blocked, **ends)
        return
    chain = planner.plan(swarm, model, span, tokens=tokens, blocked=blocked, **ends)
    covered = [b for stage in chain.stages for b in stage.span]
    assert covered == list(range(span.start, span.end))
    found = seconds(planner, swarm, model, chain, tokens=tokens, **ends)
    assert found <= min(costs) + TIE * len(chain)


@given(chances, st.integers(3, 12))
@settings(max_examples=150, deadline=None)
def test_after_any_changes_it_plans_as_if_it_had_begun_with_them(rng: Random, count: int) -> None:
    model = attrs.evolve(MODEL, blocks=8)
    measured: dict[PeerId, float] = {}
    planner = LeastLatency(random.Random(0), costs=CostModel(rtts=measured))
    servers = {n: random_server(rng, n, 8, range(count)) for n in range(count)}
    for revision in range(12):
        for n in rng.sample(range(count), rng.randint(1, 3)):
            event = rng.randrange(5)
            if event == 0:
                servers.pop(n, None)
            elif event == 1 and n in servers:
                servers[n] = attrs.evolve(servers[n], queue_seconds=rng.uniform(0, 0.5))
            elif event == 2 and n in servers:
                servers[n] = attrs.evolve(servers[n], rtts=random_server(rng, n, 8, range(count)).rtts)
            elif event == 3:
                measured[peer(n)] = rng.uniform(0.001, 0.3)
            elif event == 4 and rng.random() < 0.5:
                measured.pop(peer(n), None)
            else:
                servers[n] = random_server(rng, n, 8, range(count))
        swarm = view(*servers.values(), revision=revision)
        afresh = LeastLatency(random.Random(0), costs=CostModel(rtts=dict(measured)))
        plans = []
        for one in (planner, afresh):
            try:
                chain = one.plan(swarm, model, Span(0, 8))
                plans.append(pytest.approx(afresh.cost(swarm, model, chain).seconds, abs=TIE * 8))
            except MissingBlocksError as exc:
                plans.append(str(exc))
        assert plans[0] == plans[1]
        if plans[0] is not None and not isinstance(plans[0], str):
            chain = planner.plan(swarm, model, Span(0, 8))
            assert planner.cost(swarm, model, chain).seconds == afresh.cost(swarm, model, chain).seconds


# --- what counts -----------------------------------------------------------------------------------------


def test_a_near_server_is_preferred() -> None:
    swarm = view(server(1, 0, 12), server(2, 0, 12))
    assert text(router({1: 0.2, 2: 0.01}).plan(swarm, MODEL, WHOLE)) == ["peer2 0:12"]


def test_a_fast_server_is_worth_a_hop_and_a_slow_one_runs_as_few_blocks_as_it_can() -> None:
    swarm = view(server(1, 0, 12, decode_rps=1), server(2, 2, 12, decode_rps=100))
    assert text(router().plan(swarm, MODEL, WHOLE)) == ["peer1 0:2", "peer2 2:12"]


def test_a_queue_is_avoided() -> None:
    swarm = view(server(1, 0, 12, queue_seconds=0.1), server(2, 0, 12, queue_seconds=0.01))
    assert text(router().plan(swarm, MODEL, WHOLE)) == ["peer2 0:12"]


def test_a_full_server_costs_the_wait_and_is_used_when_there_is_no_other() -> None:
    full = server(1, 0, 12, cache_tokens_free=10)
    assert text(router().plan(view(full, server(2, 0, 12)), MODEL, WHOLE, tokens=100)) == ["peer2 0:12"]
    assert text(router().plan(view(full), MODEL, WHOLE, tokens=100)) == ["peer1 0:12"]


def test_round_trips_that_are_off_by_less_than_a_hop_do_not_split_a_span() -> None:
    near_to_me = server(1, 0, 6, rtts=rtts({2: 0.0002, 3: 0.0018}))
    near_to_the_next = server(2, 0, 6, rtts=rtts({1: 0.0002, 3: 0.0002}))
    swarm = view(near_to_me, near_to_the_next, server(3, 6, 12))
    planner = router({1: 0.0002, 2: 0.0018, 3: 0.0002})
    assert len(planner.plan(swarm, MODEL, WHOLE)) == 2
    planner.costs = attrs.evolve(planner.costs, hop_seconds=0.0)
    assert len(LeastLatency(random.Random(0), costs=planner.costs).plan(swarm, MODEL, WHOLE)) == 3


def test_published_round_trips_outweigh_the_estimate_for_better_and_for_worse() -> None:
    first = server(1, 0, 6, rtts=rtts({2: 0.2, 3: 0.001}))
    swarm = view(first, server(2, 6, 12), server(3, 6, 12), server(4, 6, 12))
    nearer_to_me = {1: 0.05, 2: 0.01, 3: 0.06, 4: 0.07}
    assert text(router(nearer_to_me).plan(swarm, MODEL, WHOLE)) == ["peer1 0:6", "peer3 6:12"]
    swarm = view(attrs.evolve(first, rtts=rtts({2: 0.3, 3: 0.3})), *list(swarm)[1:])
    assert text(router(nearer_to_me).plan(swarm, MODEL, WHOLE)) == ["peer1 0:6", "peer4 6:12"]


@pytest.mark.parametrize("east", [True, False])
def test_a_chain_begins_and_ends_near_the_client_wherever_that_is(east: bool) -> None:
    """Of either end there is a server on both sides; from the middle both are as far away."""
    middle = rtts({1: 0.06, 2: 0.06, 4: 0.06, 5: 0.06})
    first = [server(number, 0, 4, rtts=rtts({3: 0.06})) for number in (1, 2)]
    last = [server(number, 8, 12) for number in (4, 5)]
    swarm = view(*first, server(3, 4, 8, rtts=middle), *last)
    near, far = ((1, 4), (2, 5)) if east else ((2, 5), (1, 4))
    planner = router({3: 0.06, **dict.fromkeys(near, 0.01), **dict.fromkeys(far, 0.1)})
    chain = planner.plan(swarm, MODEL, WHOLE)
    assert chain.peers == (peer(near[0]), peer(3), peer(near[1]))
    cost = planner.cost(swarm, MODEL, chain)
    assert cost.return_seconds == pytest.approx(0.005), "the way back of the answer"


def test_servers_that_measured_nothing_count_as_typical() -> None:
    swarm = view(server(1, 0, 12, decode_rps=0), server(2, 0, 12, decode_rps=1), server(3, 0, 6))
    swarm = view(*swarm, server(4, 0, 6), server(5, 6, 12))
    planner = router(dict.fromkeys(range(6), 0.001))
    cost = planner.cost(swarm, MODEL, Chain((Stage(swarm.servers[peer(1)], WHOLE),)))
    assert cost.stages[0].compute == pytest.approx(12 * 0.01)
    assert planner.plan(swarm, MODEL, WHOLE).peers == (peer(1),)


def test_a_replacement_is_planned_between_its_neighbours() -> None:
    before_it = server(1, 0, 4, rtts=rtts({2: 0.2, 3: 0.01}))
    swarm = view(before_it, server(2, 4, 8, rtts=rtts({9: 0.01})), server(3, 4, 8, rtts=rtts({9: 0.01})))
    near_me = router({2: 0.001, 3: 0.3})
    assert text(near_me.plan(swarm, MODEL, Span(4, 8))) == ["peer2 4:8"]
    assert text(near_me.plan(swarm, MODEL, Span(4, 8), after=peer(1), before=peer(9))) == ["peer3 4:8"]


def test_equals_share_the_sessions_and_a_seed_repeats_the_choice() -> None:
    swarm = view(*(server(n, 0, 12) for n in range(4)))
    planner = router()
    planned = [planner.plan(swarm, MODEL, WHOLE).peers for _ in range(100)]
    assert len(set(planned)) == 4
    again = router()
    assert [again.plan(swarm, MODEL, WHOLE).peers for _ in range(100)] == planned


# --- who may be used -------------------------------------------------------------------------------------


def ban(until: float) -> Ban:
    return Ban(until, 1, "broke off")


def test_a_banned_server_is_used_for_blocks_that_nobody_else_holds_and_no_others() -> None:
    swarm = view(server(1, 0, 12), server(2, 0, 5), server(3, 8, 12))
    planner = router({2: 0.3, 3: 0.3})
    assert text(planner.plan(swarm, MODEL, WHOLE)) == ["peer1 0:12"]
    chain = planner.plan(swarm, MODEL, WHOLE, banned={peer(1): ban(9)})
    assert text(chain) == ["peer2 0:5", "peer1 5:8", "peer3 8:12"]
    swarm = view(*swarm, server(4, 5, 8))
    assert peer(1) not in planner.plan(swarm, MODEL, WHOLE, banned={peer(1): ban(9)}).peers


def test_of_banned_servers_the_one_whose_ban_ends_first_is_used() -> None:
    swarm = view(server(1, 0, 12), server(2, 0, 12))
    planner = router({1: 0.3})
    assert planner.plan(swarm, MODEL, WHOLE, banned={peer(1): ban(5), peer(2): ban(9)}).peers == (peer(1),)


def test_no_more_bans_are_lifted_than_it_takes() -> None:
    swarm = view(server(1, 0, 6), server(2, 0, 12), server(3, 6, 8))
    banned = {peer(1): ban(1), peer(2): ban(9), peer(3): ban(2)}
    assert text(router().plan(swarm, MODEL, WHOLE, banned=banned)) == ["peer2 0:12"]


def test_a_server_reprieved_for_two_parts_does_not_run_what_lies_between() -> None:
    swarm = view(server(1, 0, 12), server(2, 4, 8))
    chain = router({2: 5.0}).plan(swarm, MODEL, WHOLE, banned=[peer(1)])
    assert text(chain) == ["peer1 0:4", "peer2 4:8", "peer1 8:12"]


@given(chances, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_bans_never_leave_a_block_without_holder(rng: Random, count: int) -> None:
    model = attrs.evolve(MODEL, blocks=6)
    swarm = view(*(random_server(rng, n, 6, range(count)) for n in range(count)))
    banned = {peer(n): ban(rng.random()) for n in range(count) if rng.random() < 0.5}
    online = [s for s in swarm if s.state == "online" and s.span]
    held_by = {b: {s.peer for s in online if s.span and b in s.span} for b in range(6)}
    try:
        chain = router().plan(swarm, model, Span(0, 6), banned=banned)
    except MissingBlocksError as exc:
        missing = {b for r in exc.ranges for b in range(Span.parse(r).start, Span.parse(r).end)}
        assert missing == {b for b in range(6) if not held_by[b]}
        return
    for stage in chain.stages:
        if stage.server.peer in banned:
            for block in stage.span:
                assert held_by[block] <= set(banned)


def test_blocked_servers_are_never_used_whoever_blocks_them() -> None:
    swarm = view(server(1, 0, 12), server(2, 0, 12), server(3, 0, 12))
    assert router(blocked=[peer(1)]).plan(swarm, MODEL, WHOLE, blocked=[peer(2)]).peers == (peer(3),)
    assert router(allowed=[peer(2)]).plan(swarm, MODEL, WHOLE).peers == (peer(2),)
    with pytest.raises(MissingBlocksError, match="no server that this client may use holds blocks 0:12"):
        router(allowed=[peer(2)]).plan(swarm, MODEL, WHOLE, blocked=[peer(2)], banned=[peer(2)])


def test_missing_blocks_are_named() -> None:
    with pytest.raises(MissingBlocksError, match=r"serve --model MODEL --blocks 3:5") as caught:
        router().plan(view(server(1, 0, 3), server(2, 5, 9)), MODEL, WHOLE)
    assert caught.value.ranges == ["3:5", "9:12"]


def test_servers_with_other_weights_are_never_used() -> None:
    stranger = attrs.evolve(MODEL, fingerprint="0" * 32)
    with pytest.raises(ModelMismatchError, match="other weights"):
        router().plan(view(server(1, 0, 12, model=stranger)), MODEL, WHOLE)


# --- hops ------------------------------------------------------------------------------------------------


def test_a_limit_of_hops_takes_a_slower_server_over_two_fast_ones() -> None:
    swarm = view(server(1, 0, 12, decode_rps=1), server(2, 0, 6), server(3, 6, 12))
    assert len(router().plan(swarm, MODEL, WHOLE)) == 2
    assert text(router(max_hops=1).plan(swarm, MODEL, WHOLE)) == ["peer1 0:12"]


def test_a_limit_of_hops_that_nothing_meets_is_named_with_what_it_takes() -> None:
    swarm = view(*(server(n, n * 3, n * 3 + 3) for n in range(4)))
    with pytest.raises(MissingBlocksError, match=r"no chain of 2 servers or fewer .* 4 are needed") as caught:
        router(max_hops=2).plan(swarm, MODEL, WHOLE)
    assert caught.value.ranges == ["0:12"]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="max_hops"):
        router(max_hops=0)


# --- the route as people see it ---------------------------------------------------------------------------


def test_a_route_shows_where_the_time_goes() -> None:
    swarm = view(server(1, 0, 6, queue_seconds=0.002), server(2, 6, 12))
    planner = router({1: 0.02, 2: 0.04})
    cost = planner.cost(swarm, MODEL, planner.plan(swarm, MODEL, WHOLE))
    assert cost.seconds == pytest.approx(0.011 + 0.002 + 0.06 + 0.031 + 0.06 + 0.02, abs=1e-5)
    lines = str(cost).splitlines()
    assert lines[1].split() == ["peer1", "0:6", "11.0", "ms", "2.0", "ms", "60.0", "ms"]
    assert lines[-2].split() == ["back", "20.0", "ms"]
    assert "184.0 ms a token, 5.4 tokens/s" in lines[-1]


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), -1.0, 0.0])
def test_round_trips_that_cannot_be_are_no_way_to_draw_sessions(claim: float) -> None:
    swarm = view(server(1, 0, 6, rtts=rtts({2: claim, 3: claim})), server(2, 6, 12), server(3, 6, 12))
    planner = router({1: 0.01, 2: 0.01, 3: 0.2})
    chain = planner.plan(swarm, MODEL, WHOLE)
    assert 0.12 < planner.cost(swarm, MODEL, chain).seconds < 6
    assert text(chain) == ["peer1 0:6", "peer2 6:12"]


def test_a_prefill_is_weighed_by_its_own_measure() -> None:
    swarm = view(server(1, 0, 6, forward_rps=500.0), server(2, 6, 12))
    planner = router({1: 0.02, 2: 0.02})
    chain = planner.plan(swarm, MODEL, WHOLE)
    compute = 100 / 500 + 100 / 500  # the other has not measured itself: as fast as what is typical
    assert planner.prefill_seconds(swarm, MODEL, chain, 100) == pytest.approx(compute + 0.042, abs=1e-3)
