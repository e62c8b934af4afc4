import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InputError
from swarmcore.placement.capacity import SPARE, BlockNeeds, plan_capacity, size

MIB, GIB = 2**20, 2**30
NEEDS = BlockNeeds(weights=200 * MIB, cache_per_token=4096, backward=10 * MIB, reading=0)


def test_all_blocks_when_there_is_room():
    plan = plan_capacity(NEEDS, memory_free=20 * GIB, blocks=30)
    assert plan.blocks == 30
    assert plan.reasons == (
        "memory: 20 GiB free, of which 10 % are left to others",
        "a block: 200 MiB of weights, 32 MiB of cache for 8,192 tokens, 10 MiB for backward passes; "
        "0 KiB more while it is loaded",
        "room for 76: all of 30 blocks",
    )


def test_as_many_as_fit():
    plan = plan_capacity(NEEDS, memory_free=2 * GIB, blocks=30)
    assert plan.blocks == 7
    assert plan.reasons[-1] == "room for 7: 7 of 30 blocks"


def test_more_cache_leaves_room_for_fewer_blocks():
    assert plan_capacity(NEEDS, memory_free=2 * GIB, blocks=30, cache_tokens=100_000).blocks == 3


def test_no_more_than_is_allowed():
    plan = plan_capacity(NEEDS, memory_free=20 * GIB, blocks=30, most=GIB)
    assert plan.blocks == 4
    assert plan.reasons[0].endswith("are left to others, and 1.0 GiB may be taken")
    assert plan.room(4) == 224 * MIB
    assert plan.room(30) == 0
    assert plan_capacity(NEEDS, memory_free=2 * GIB, blocks=30, most=20 * GIB).blocks == 7


def test_what_is_taken_once_is_taken_once() -> None:
    """As where blocks are made plain one after the other, to be rounded."""
    needs = BlockNeeds(weights=100 * MIB, cache_per_token=0, once=500 * MIB)
    assert plan_capacity(needs, memory_free=2000 * MIB, blocks=80).blocks == 13
    with pytest.raises(InputError, match="it takes 600 MiB"):
        plan_capacity(needs, memory_free=600 * MIB, blocks=80)


def test_what_loading_takes_counts_instead_of_the_cache_when_it_is_more():
    loading = BlockNeeds(weights=100 * MIB, cache_per_token=1024, reading=300 * MIB)
    assert plan_capacity(loading, memory_free=GIB, blocks=30).blocks == 2


@pytest.mark.parametrize("wanted", [3, 12])
def test_a_number_asked_for_is_taken(wanted):
    plan = plan_capacity(NEEDS, memory_free=2 * GIB, blocks=30, wanted=wanted)
    assert plan.blocks == wanted
    assert f"{wanted} of 30 blocks, as asked for" in plan.reasons
    assert any("warning: only 7 seem to fit" in reason for reason in plan.reasons) == (wanted > 7)


def test_more_than_the_model_has_are_all_it_has():
    plan = plan_capacity(NEEDS, memory_free=2 * GIB, blocks=30, wanted=31)
    assert plan.blocks == 30
    assert "30 of 30 blocks; 31 were asked for, and the model has no more" in plan.reasons


def test_a_machine_without_room_for_a_block_is_told_what_would_help():
    with pytest.raises(InputError, match=r"not one block fits: it takes 242 MiB .* --num-blocks 1"):
        plan_capacity(NEEDS, memory_free=200 * MIB, blocks=30)


@given(
    weights=st.integers(1, 10 * GIB),
    cache=st.integers(0, 2**20),
    backward=st.integers(0, GIB),
    reading=st.integers(0, 10 * GIB),
    free=st.integers(0, 1000 * GIB),
    tokens=st.integers(1, 10**6),
    blocks=st.integers(1, 200),
)
def test_a_plan_stays_within_the_memory(weights, cache, backward, reading, free, tokens, blocks):
    needs = BlockNeeds(weights=weights, cache_per_token=cache, backward=backward, reading=reading)
    try:
        plan = plan_capacity(needs, memory_free=free, blocks=blocks, cache_tokens=tokens)
    except InputError:
        assert needs.total(tokens) > int(free * (1 - SPARE))
    else:
        assert 1 <= plan.blocks <= blocks
        assert plan.blocks * needs.total(tokens) <= free


def test_sizes_as_people_read_them():
    assert [size(n) for n in (0, 3000, 1_500_000, 300 * MIB, 3 * GIB // 2, 12 * GIB)] == [
        "0 KiB",
        "2 KiB",
        "1.4 MiB",
        "300 MiB",
        "1.5 GiB",
        "12 GiB",
    ]
