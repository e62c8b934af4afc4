import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InvalidStepError, ProtocolError
from swarmcore.session.laps import SessionLaps
from swarmcore.types import PeerId
from swarmcore.wire.messages import Hop, StepOutput

HOPS = [Hop(PeerId(f"p{i}"), (), f"{i:032x}", i * 4, i * 4 + 4) for i in range(3)]


def laps(sequences: int = 1, **options) -> SessionLaps:
    return SessionLaps(HOPS, sequences=sequences, **options)


def run(session: SessionLaps, *lengths: int, starts=None):
    lap = session.begin(lengths, starts, "last", chunk_rows=100)
    session.commit(lap)
    return lap


def test_a_lap_goes_straight_through_the_chain():
    session = laps()
    lap = session.begin([5], None, "last", chunk_rows=100)
    step = session.step_for(0, lap.chunks[0], lap, codec="raw", deadline=1.0)
    assert step.chain == tuple(HOPS[1:])
    assert step.reply == "last"
    assert session.received(2, StepOutput(step.step, 12)) is None


def test_positions_move_when_a_lap_is_committed():
    session = laps(2)
    run(session, 3, 5)
    run(session, 1, 0)
    assert session.positions == (4, 5)


def test_an_abandoned_lap_leaves_the_positions_where_it_started():
    session = laps()
    run(session, 9)
    session.abandon(session.begin([2], [4], "last", chunk_rows=100))
    assert session.positions == (4,)
    session.abandon(session.begin([2], None, "last", chunk_rows=100))
    assert session.positions == (4,)


def test_a_hop_that_a_server_cannot_make_is_carried_from_then_on():
    session = laps()
    lap = session.begin([5], None, "last", chunk_rows=100)
    assert session.received(0, StepOutput(0, 4, undelivered="no route")) == 1
    onward = session.step_for(1, lap.chunks[0], lap, codec="raw", deadline=1.0)
    assert onward.chain == (HOPS[2],)
    assert onward.reply == "last"
    session.commit(lap)
    lap = session.begin([1], None, "last", chunk_rows=100)
    first = session.step_for(0, lap.chunks[0], lap, codec="raw", deadline=1.0)
    assert first.chain == ()
    assert first.reply == "all", "an output that is to be carried on must be whole"


def test_a_carried_hop_known_at_opening_is_never_tried():
    session = laps(carried=[1])
    lap = session.begin([5], None, "last", chunk_rows=100)
    step = session.step_for(0, lap.chunks[0], lap, codec="raw", deadline=1.0)
    assert step.chain == (HOPS[1],)
    assert session.received(1, StepOutput(step.step, 8)) == 2


def test_an_output_of_other_blocks_is_refused():
    session = laps()
    session.begin([5], None, "last", chunk_rows=100)
    with pytest.raises(ProtocolError, match="block 7"):
        session.received(2, StepOutput(0, 7))


@pytest.mark.parametrize(
    ("lengths", "starts"),
    [
        ([1], None),
        ([1, 2, 3], None),
        ([0, 0], None),
        ([-1, 2], None),
        ([1, 1], [0]),
        ([1, 1], [1, 0]),
        ([1, 1], [-1, 0]),
    ],
)
def test_laps_that_do_not_fit_the_session_are_refused(lengths, starts):
    with pytest.raises(InvalidStepError):
        laps(2).begin(lengths, starts, "last", chunk_rows=100)


def test_rollback_is_only_to_what_is_cached():
    session = laps(2)
    run(session, 3, 5)
    session.rollback([1, 5])
    assert session.positions == (1, 5)
    with pytest.raises(InvalidStepError):
        session.rollback([2, 5])
    with pytest.raises(InvalidStepError):
        session.rollback([1])


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    chunk_rows=st.integers(1, 50),
    cached=st.integers(0, 7),
)
def test_chunks_cover_every_row_once_and_in_order(lengths, chunk_rows, cached):
    session = laps(len(lengths))
    session.positions = (cached,) * len(lengths)
    lap = session.begin(lengths, None, "last", chunk_rows=chunk_rows)
    rows = [row for chunk in lap.chunks for row in range(chunk.first_row, chunk.first_row + chunk.rows)]
    assert rows == list(range(sum(lengths)))
    at = [cached] * len(lengths)
    for chunk in lap.chunks:
        assert chunk.rows <= chunk_rows
        assert list(chunk.starts) == at
        at = [start + length for start, length in zip(at, chunk.lengths, strict=True)]
    assert tuple(at) == lap.ends
    assert [chunk.step for chunk in lap.chunks] == list(range(len(lap.chunks)))
