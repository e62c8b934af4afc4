"""Chains of servers that compute alike are taken where they cost little, and so are replacements."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import pytest
from announced import MODEL, WHOLE, peer, server, view
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcore.errors import MissingBlocksError
from swarmcore.routing.chain import Chain
from swarmcore.routing.costs import CostModel
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.routing.numerics import LONGEST_WAIT, SLOWER, plan_alike
from swarmcore.types import Numerics, ServerInfo, Span

TORCH, GGML = Numerics.parse("torch/bf16"), Numerics.parse("ggml/q4_k_m/f32/f16")


def router(**options: Any) -> LeastLatency:
    return LeastLatency(random.Random(0), costs=CostModel(default_rtt=0.01), **options)


def of(
    numerics: Numerics, number: int, start: int, end: int, *, ms: float = 10.0, **fields: Any
) -> ServerInfo:
    """A server that takes so many milliseconds a block."""
    rate = 1000 / (ms * (end - start))
    return server(number, start, end, numerics=str(numerics), decode_rps=rate, **fields)


def chosen(*servers: ServerInfo, span: Span = WHOLE, max_hops: int | None = None, **options: Any) -> Chain:
    return plan_alike(router(max_hops=max_hops), view(*servers), MODEL, span, **options)


def numbers(chain: Chain, servers: Collection[ServerInfo]) -> list[int]:
    return [next(n for n in range(100) if peer(n) == each) for each in chain.peers]


def test_a_chain_of_one_kind_is_taken_where_it_costs_little() -> None:
    mixed = [of(TORCH, 0, 0, 6), of(GGML, 1, 6, 12, ms=5), of(TORCH, 2, 6, 12, ms=9)]
    assert numbers(router().plan(view(*mixed), MODEL, WHOLE), mixed) == [0, 1]
    assert numbers(chosen(*mixed), mixed) == [0, 2]
    assert chosen(*mixed).numerics == (TORCH,)


def test_a_chain_of_one_kind_that_is_much_slower_is_not_taken() -> None:
    servers = [of(TORCH, 0, 0, 6), of(GGML, 1, 6, 12, ms=1), of(TORCH, 2, 6, 12, ms=12)]
    assert numbers(chosen(*servers), servers) == [0, 1]
    assert chosen(*servers).numerics == (TORCH, GGML)


def test_the_faster_of_two_kinds_is_taken() -> None:
    halves = [(TORCH, 0, 0), (GGML, 1, 0), (TORCH, 2, 6), (GGML, 3, 6)]
    pace = {0: 10.0, 1: 11.0, 2: 11.0, 3: 9.5}
    servers = [of(way, n, start, start + 6, ms=pace[n]) for way, n, start in halves]
    assert numbers(router().plan(view(*servers), MODEL, WHOLE), servers) == [0, 3]
    assert chosen(*servers).numerics == (GGML,)


def test_a_replacement_computes_as_what_it_replaces_did_however_slow() -> None:
    servers = [of(GGML, 0, 6, 12, ms=1), of(TORCH, 1, 6, 12, ms=100)]
    span = Span(6, 12)
    assert chosen(*servers, span=span).peers == (peer(0),)
    assert chosen(*servers, span=span, like=TORCH).peers == (peer(1),)
    assert chosen(*servers, span=span, like=TORCH, blocked={peer(1)}).peers == (peer(0),)
    assert chosen(*servers, span=span, like=TORCH, banned={peer(1)}).peers == (peer(0),)


def test_a_replacement_is_not_waited_for_until_there_is_room() -> None:
    full = of(TORCH, 1, 6, 12, cache_tokens_free=0)
    servers = [of(GGML, 0, 6, 12), full]
    assert chosen(*servers, span=Span(6, 12), like=TORCH, tokens=50).peers == (peer(1),)
    wait = CostModel().room(full, 500)
    assert wait > LONGEST_WAIT
    assert chosen(*servers, span=Span(6, 12), like=TORCH, tokens=500).peers == (peer(0),)


def test_where_nobody_computes_so_others_do_and_alike_among_themselves() -> None:
    other = Numerics.parse("torch/nf4/bf16")
    servers = [of(GGML, 0, 0, 6, ms=5), of(other, 1, 0, 6, ms=6), of(other, 2, 6, 12, ms=5)]
    assert chosen(*servers, like=TORCH).numerics == (other,)


def test_hops_and_bans_hold_for_chains_of_one_kind_too() -> None:
    servers = [of(TORCH, 0, 0, 6), of(TORCH, 1, 6, 9), of(TORCH, 2, 9, 12), of(GGML, 3, 6, 12)]
    assert chosen(*servers, max_hops=2).numerics == (TORCH, GGML)
    banned = [of(TORCH, 0, 0, 6), of(TORCH, 1, 6, 12), of(GGML, 2, 6, 12)]
    assert chosen(*banned, banned={peer(1)}).numerics == (TORCH, GGML)
    with pytest.raises(MissingBlocksError):
        chosen(*servers[:2], like=GGML)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_planned_is_within_the_bound_or_mixed_for_want_of_better(seed: int) -> None:
    rng = random.Random(seed)
    spans = [(0, 4), (0, 6), (4, 8), (6, 12), (8, 12), (0, 12)]
    kinds = [TORCH, GGML, Numerics.parse("torch/int8/bf16")]
    servers = [of(rng.choice(kinds), n, *rng.choice(spans), ms=rng.uniform(1, 30)) for n in range(7)]
    servers.append(of(TORCH, 8, 0, 12, ms=rng.uniform(1, 60)))
    swarm, planner = view(*servers), router()
    best = planner.cost(swarm, MODEL, planner.plan(swarm, MODEL, WHOLE)).seconds
    chain = plan_alike(planner, swarm, MODEL, WHOLE)
    taken = planner.cost(swarm, MODEL, chain).seconds
    assert taken <= SLOWER * best + 1e-3
    if len(chain.numerics) > 1:
        for kind in kinds:
            others = {each.peer for each in servers if each.computes != kind}
            try:
                alike = planner.plan(swarm, MODEL, WHOLE, blocked=others)
            except MissingBlocksError:
                continue
            assert planner.cost(swarm, MODEL, alike).seconds > SLOWER * best - 1e-3
