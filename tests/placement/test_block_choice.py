"""The join rule, and what counts for it."""

import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InputError
from swarmcore.placement.choice import join_span, tiles, worst_spans
from swarmcore.placement.swarm_throughput import block_throughputs, placements, unique_blocks
from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

MODEL = ModelInfo("tiny", "f" * 32, blocks=12, hidden_size=8)
NEW = PeerId("new")


def server(peer: str, blocks: str, throughput: float = 10.0, **fields) -> ServerInfo:
    return ServerInfo(PeerId(peer), (), model=MODEL, span=Span.parse(blocks), throughput=throughput, **fields)


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView({s.peer: s for s in servers})


def alone(me: ServerInfo, *others: ServerInfo) -> Span | None:
    return unique_blocks([me, *others], MODEL.blocks).get(me.peer)


def throughputs(swarm: SwarmView) -> list[float]:
    return block_throughputs(placements(swarm, MODEL), MODEL.blocks)


def test_servers_that_hold_a_block_add_up():
    swarm = view(server("a", "0:6", 1.5), server("b", "4:12", 2.0))
    assert throughputs(swarm) == [1.5] * 4 + [3.5] * 2 + [2.0] * 6


def test_joining_counts_draining_does_not_and_a_mover_counts_where_it_goes():
    swarm = view(
        server("a", "0:2", state="joining"),
        server("b", "2:4", state="draining"),
        server("c", "4:6", target=Span(8, 10)),
    )
    assert throughputs(swarm) == [10, 10, 0, 0, 0, 0, 0, 0, 10, 10, 0, 0]
    still = placements(swarm, MODEL, staying=[PeerId("c")])
    assert block_throughputs(still, 12)[4:6] == [10, 10]


def test_who_tells_no_throughput_counts_as_the_middling_server():
    swarm = view(server("a", "0:1", 1), server("b", "1:2", 4), server("c", "2:3", 9), server("d", "3:4", 0.0))
    assert throughputs(swarm)[3] == 4


def test_blocks_that_the_model_does_not_have_do_not_count():
    longer = attrs.evolve(MODEL, blocks=100)
    liars = (
        ServerInfo(PeerId("x"), (), model=longer, span=Span(10, 99), throughput=1.0),
        ServerInfo(PeerId("y"), (), model=longer, span=Span(50, 99), throughput=1.0),
    )
    assert throughputs(view(*liars)) == [0] * 10 + [1, 1]


def test_a_new_server_takes_what_nobody_holds():
    swarm = view(server("a", "0:5"), server("b", "9:12"))
    assert join_span(swarm, MODEL, 4, random.Random(0), peer=NEW) == Span(5, 9)


def test_of_spans_with_equal_minimum_the_next_worst_block_decides():
    assert worst_spans([5, 1, 5, 5, 1, 2, 9], 2) == [Span(4, 6)]


def test_what_a_server_announced_itself_does_not_count_against_it():
    swarm = view(server("a", "0:6"), server("b", "6:12"), server(NEW, "6:12"))
    assert join_span(swarm, MODEL, 6, random.Random(0), peer=NEW) in (Span(i, i + 6) for i in range(7))


def test_servers_that_join_an_empty_swarm_at_once_spread():
    starts = {
        join_span(view(), MODEL, 3, random.Random(seed), peer=PeerId(str(seed))).start for seed in range(60)
    }
    assert starts == {0, 3, 6, 9}


def test_equal_stretches_are_tiled_from_both_ends():
    assert tiles(worst_spans([0.0] * 10, 4), [0.0] * 10) == [Span(i, i + 4) for i in (0, 2, 4, 6)]
    throughputs = [1.0, 0, 0, 0, 0, 0, 1, 1]
    assert tiles(worst_spans(throughputs, 2), throughputs) == [Span(i, i + 2) for i in (1, 2, 3, 4)]
    assert tiles(worst_spans(throughputs, 5), throughputs) == [Span(1, 6)]


@pytest.mark.parametrize(("blocks", "size"), [(12, 4), (30, 18), (30, 10), (7, 3)])
def test_servers_that_come_one_by_one_cover_the_model_with_as_few_as_it_takes(blocks, size):
    for seed in range(20):
        rng = random.Random(seed)
        model = attrs.evolve(MODEL, blocks=blocks)
        swarm = view()
        for number in range(-(-blocks // size)):
            peer = PeerId(str(number))
            span = join_span(swarm, model, size, rng, peer=peer)
            swarm = view(*swarm, ServerInfo(peer, (), model=model, span=span, throughput=1.0))
        assert min(block_throughputs(placements(swarm, model), blocks)) == 1.0


@pytest.mark.parametrize(("blocks", "size", "step"), [(12, 5, 4), (30, 10, 4), (31, 9, 3), (14, 4, 4)])
def test_servers_whose_spans_begin_at_multiples_cover_the_model(blocks: int, size: int, step: int) -> None:
    model = attrs.evolve(MODEL, blocks=blocks)
    for seed in range(20):
        rng, swarm = random.Random(seed), view()
        for number in range(-(-blocks // (size - size % step))):
            peer = PeerId(str(number))
            span = join_span(swarm, model, size, rng, peer=peer, start_step=step)
            assert span.start % step == 0
            assert span.end % step == 0 or span.end == blocks
            swarm = view(
                *swarm, ServerInfo(peer, (), model=model, span=span, throughput=1.0, start_step=step)
            )
        assert min(block_throughputs(placements(swarm, model), blocks)) == 1.0


@pytest.mark.parametrize("size", [1, 3])
def test_a_server_with_room_for_less_than_a_step_is_told(size: int) -> None:
    with pytest.raises(InputError, match=f"{size} blocks fit here, and tiny is cut after every 4 blocks"):
        join_span(view(), MODEL, size, random.Random(0), peer=NEW, start_step=4)
    small = attrs.evolve(MODEL, blocks=3)
    assert join_span(view(), small, 3, random.Random(0), peer=NEW, start_step=4) == Span(0, 3)


def test_a_server_that_can_hold_all_takes_all():
    assert join_span(view(server("a", "0:6")), MODEL, 99, random.Random(0), peer=NEW) == Span(0, 12)


@given(
    throughputs=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    size=st.integers(1, 12),
)
def test_the_worst_spans_are_those_that_a_full_comparison_finds(throughputs, size):
    size = min(size, len(throughputs))
    spans = [Span(start, start + size) for start in range(len(throughputs) - size + 1)]
    keys = {span: sorted(throughputs[span.start : span.end]) for span in spans}
    expected = [span for span in spans if keys[span] == min(keys.values())]
    assert worst_spans(throughputs, size) == expected


def test_unique_blocks_count_neither_those_who_leave_nor_those_who_load():
    me = server("a", "0:6")
    assert alone(me) == Span(0, 6)
    assert alone(me, server("b", "2:12")) == Span(0, 2)
    assert alone(me, server("b", "0:12")) is None
    assert alone(me, server("b", "0:12", state="joining")) == Span(0, 6)
    assert alone(me, server("b", "0:6", target=Span(3, 9))) == Span(0, 3)
    assert alone(attrs.evolve(me, target=Span(3, 9)), server("b", "3:12")) == Span(0, 3)


def test_who_cannot_move_keeps_all_its_blocks():
    swarm = view(
        server("a", "0:6"),
        server("b", "0:12", pinned=True),
        server("c", "3:9", state="joining"),
        server("d", "3:9", target=Span(0, 6)),
    )
    keeps = {each.peer: each.keeps for each in placements(swarm, MODEL)}
    assert keeps == {"a": None, "b": Span(0, 12), "c": Span(3, 9), "d": Span(0, 6)}
    assert placements(swarm, MODEL, staying=[PeerId("d")])[-1].keeps is None
