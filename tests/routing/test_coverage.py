import random

import pytest
from fewest_servers import FewestServers
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import MissingBlocksError, ModelMismatchError
from swarmcore.identity import Identity
from swarmcore.registry.base import SwarmView
from swarmcore.routing.coverage import missing_ranges
from swarmcore.types import ModelInfo, ServerInfo, ServerState, Span

MODEL = ModelInfo("tiny", "f" * 32, blocks=12, hidden_size=8)
WHOLE = Span(0, 12)


def server(
    start: int, end: int, *, state: ServerState = "online", model: ModelInfo = MODEL, free: int = 1000
) -> ServerInfo:
    return ServerInfo(
        peer=Identity.generate().peer,
        addresses=(),
        state=state,
        model=model,
        span=Span(start, end),
        cache_tokens=1000,
        cache_tokens_free=free,
    )


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView({s.peer: s for s in servers})


def router(**options: object) -> FewestServers:
    return FewestServers(random.Random(0), **options)  # type: ignore[arg-type]


def spans(chain) -> list[str]:
    return [str(stage.span) for stage in chain.stages]


def test_one_server_that_holds_all_is_the_whole_chain():
    swarm = view(server(0, 4), server(4, 12), server(0, 12))
    assert spans(router().plan(swarm, MODEL, WHOLE)) == ["0:12"]


def test_overlapping_servers_run_a_part_of_what_they_hold():
    swarm = view(server(0, 7), server(5, 12))
    assert spans(router().plan(swarm, MODEL, WHOLE)) == ["0:7", "7:12"]


def test_a_part_of_the_model_can_be_planned():
    swarm = view(server(0, 7), server(5, 12))
    assert spans(router().plan(swarm, MODEL, Span(3, 6))) == ["3:6"]


def test_a_server_with_room_in_its_cache_is_preferred_among_equals():
    roomy, full = server(0, 12, free=500), server(0, 12, free=10)
    for seed in range(10):
        chain = FewestServers(random.Random(seed)).plan(view(full, roomy), MODEL, WHOLE, tokens=100)
        assert chain.peers == (roomy.peer,)


def test_equals_share_the_sessions():
    swarm = view(server(0, 12), server(0, 12))
    planner = router()
    assert len({planner.plan(swarm, MODEL, WHOLE).peers for _ in range(40)}) == 2


@pytest.mark.parametrize("state", ["joining", "draining"])
def test_only_online_servers_are_used(state):
    with pytest.raises(MissingBlocksError):
        router().plan(view(server(0, 12, state=state)), MODEL, WHOLE)


def test_blocked_and_not_allowed_servers_are_left_out():
    one, other = server(0, 12), server(0, 12)
    assert router().plan(view(one, other), MODEL, WHOLE, blocked=[one.peer]).peers == (other.peer,)
    assert router(allowed=[one.peer]).plan(view(one, other), MODEL, WHOLE).peers == (one.peer,)


def test_missing_blocks_are_named_with_what_to_start():
    with pytest.raises(MissingBlocksError, match=r"serve --model MODEL --blocks 3:5") as caught:
        router().plan(view(server(0, 3), server(5, 9)), MODEL, WHOLE)
    assert caught.value.ranges == ["3:5", "9:12"]


def test_servers_with_other_weights_are_never_used():
    stranger = ModelInfo("tiny", "0" * 32, blocks=12, hidden_size=8)
    with pytest.raises(ModelMismatchError) as caught:
        router().plan(view(server(0, 12, model=stranger)), MODEL, WHOLE)
    assert "ffffffffffff" in str(caught.value)
    assert "000000000000" in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda s: s[0] < s[1]), max_size=8))
def test_a_chain_covers_the_model_with_the_fewest_servers(held):
    swarm = view(*(server(a, b) for a, b in held))
    covered = {block for a, b in held for block in range(a, b)}
    if len(covered) < 12:
        with pytest.raises(MissingBlocksError):
            router().plan(swarm, MODEL, WHOLE)
        return
    chain = router().plan(swarm, MODEL, WHOLE)
    assert [b for stage in chain.stages for b in stage.span] == list(range(12))
    assert all(
        stage.server.span.start <= stage.span.start and stage.span.end <= stage.server.span.end
        for stage in chain.stages
    )
    assert len(chain) == fewest(held)


def fewest(held: list[tuple[int, int]]) -> int:
    """Breadth-first search over positions, as a check on the greedy choice."""
    reached, steps = {0}, 0
    while 12 not in reached:
        reached |= {b for a, b in held if any(a <= position for position in reached)}
        steps += 1
    return steps


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 31)).filter(lambda s: s[0] < s[1])))
def test_missing_ranges_and_spans_make_up_the_whole(held):
    whole = Span(5, 20)
    missing = {b for span in missing_ranges((Span(a, b) for a, b in held), whole) for b in span}
    covered = {b for a, b in held for b in range(a, b)}
    assert missing == set(range(5, 20)) - covered
