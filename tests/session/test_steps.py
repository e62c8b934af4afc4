import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InvalidStepError, ProtocolError
from swarmcore.session.steps import SessionSteps
from swarmcore.types import PeerId
from swarmcore.wire.messages import Hop, Recall, StepOutput

HOPS = [Hop(PeerId(f"p{i}"), (), f"{i:032x}", i * 4, i * 4 + 4) for i in range(3)]


def session_steps(sequences: int = 1, **options) -> SessionSteps:
    return SessionSteps(HOPS, sequences=sequences, **options)


def run(session: SessionSteps, *lengths: int, starts=None):
    plan = session.begin(lengths, starts, "last", chunk_rows=100)
    for chunk in plan.chunks:
        session.settle(chunk)
    return plan


def test_a_step_goes_straight_through_the_chain():
    session = session_steps()
    plan = session.begin([5], None, "last", chunk_rows=100)
    step = session.step_for(0, plan.chunks[0], codec="raw", deadline=1.0)
    assert step.chain == tuple(HOPS[1:])
    assert step.reply == "last"
    assert session.received(2, StepOutput(step.step, 12)) is None


def test_positions_move_when_chunks_come_home():
    session = session_steps(2)
    run(session, 3, 5)
    run(session, 1, 0)
    assert session.positions == (4, 5)


def test_an_abandoned_step_leaves_the_positions_where_it_started():
    session = session_steps()
    run(session, 9)
    session.abandon([session.begin([2], [4], "last", chunk_rows=100)])
    assert session.positions == (4,)
    session.abandon([session.begin([2], None, "last", chunk_rows=100)])
    assert session.positions == (4,)


def test_a_hop_that_a_server_cannot_make_is_carried_from_then_on():
    session = session_steps()
    plan = session.begin([5], None, "last", chunk_rows=100)
    assert session.received(0, StepOutput(0, 4, undelivered="no route")) == 1
    onward = session.step_for(1, plan.chunks[0], codec="raw", deadline=1.0)
    assert onward.chain == (HOPS[2],)
    assert onward.reply == "last"
    session.settle(plan.chunks[0])
    plan = session.begin([1], None, "last", chunk_rows=100)
    first = session.step_for(0, plan.chunks[0], codec="raw", deadline=1.0)
    assert first.chain == ()
    assert first.reply == "all", "an output that is to be carried on must be whole"


def test_a_carried_hop_known_at_opening_is_never_tried():
    session = session_steps(carried=[1])
    plan = session.begin([5], None, "last", chunk_rows=100)
    step = session.step_for(0, plan.chunks[0], codec="raw", deadline=1.0)
    assert step.chain == (HOPS[1],)
    assert session.received(1, StepOutput(step.step, 8)) == 2


def test_an_output_of_other_blocks_is_refused():
    session = session_steps()
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
        session_steps(2).begin(lengths, starts, "last", chunk_rows=100)


def test_rollback_is_only_to_what_is_cached():
    session = session_steps(2)
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
    session = session_steps(len(lengths))
    session.begin_at((cached,) * len(lengths))
    plan = session.begin(lengths, None, "last", chunk_rows=chunk_rows)
    rows = [row for chunk in plan.chunks for row in range(chunk.first_row, chunk.first_row + chunk.rows)]
    assert rows == list(range(sum(lengths)))
    at = [cached] * len(lengths)
    for chunk in plan.chunks:
        assert chunk.rows <= chunk_rows
        assert list(chunk.starts) == at
        at = [start + length for start, length in zip(at, chunk.lengths, strict=True)]
    assert at == [cached + length for length in lengths]
    assert [chunk.step for chunk in plan.chunks] == list(range(len(plan.chunks)))


def test_a_step_may_reorder_its_sequences():
    session = session_steps(3)
    run(session, 4, 2, 7)
    plan = session.begin([1, 1, 0], None, "last", chunk_rows=1, sources=[2, 2, 0])
    assert plan.starts == (7, 7, 4)
    assert [chunk.sources for chunk in plan.chunks] == [(2, 2, 0), ()], "once is enough"
    assert session.reordering(plan)
    session.abandon([plan])
    assert session.positions == (4, 2, 7), "nothing of it got through"
    plan = session.begin([1, 1, 0], None, "last", chunk_rows=1, sources=[2, 2, 0])
    session.settle(plan.chunks[0])
    session.abandon([plan])
    assert session.positions == (7, 7, 4), "the sequences are reordered for good"


@pytest.mark.parametrize("sources", [[0], [0, 2], [0, -1]])
def test_sources_are_sequences_of_the_session(sources):
    with pytest.raises(InvalidStepError):
        session_steps(2).begin([1, 1], None, "last", chunk_rows=9, sources=sources)


def test_stages_can_be_replaced_by_more_or_fewer():
    session = session_steps(carried=[0, 2])
    halves = [Hop(PeerId("a"), (), "a" * 32, 4, 6), Hop(PeerId("b"), (), "b" * 32, 6, 8)]
    session.replace(1, 1, halves, carried=[0])
    assert session.hops == (HOPS[0], *halves, HOPS[2])
    assert session.carried == {1, 3}, "the stage before is tried again, those behind keep their ways"
    whole = Hop(PeerId("c"), (), "c" * 32, 0, 12)
    session.replace(0, 3, [whole])
    assert session.hops == (whole,)
    assert session.carried == frozenset()


def test_a_replay_ends_where_the_new_stages_do():
    session = session_steps(2)
    chunks = session.replay([0, 3], [6, 5], until=8, reply="none", chunk_rows=5)
    assert [(chunk.starts, chunk.lengths) for chunk in chunks] == [((0, 3), (5, 0)), ((5, 3), (1, 2))]
    step = session.step_for(0, chunks[0], codec="raw", deadline=1.0, journal="client")
    assert step.chain == (HOPS[1],)
    assert (step.replay, step.reply, step.journal) == (True, "none", "client")
    assert session.replay([4, 4], [4, 4], until=8, reply="none", chunk_rows=5) == []


def test_a_step_tells_what_has_come_home():
    session = session_steps()
    run(session, 3)
    plan = session.begin([1], None, "last", chunk_rows=9)
    assert session.step_for(0, plan.chunks[0], codec="raw", deadline=1.0, attempt=2).settled == 1


def test_a_step_goes_behind_those_under_way():
    session = session_steps(2)
    run(session, 4, 4)
    first, second = (session.begin([3, 2], None, "all", chunk_rows=100) for _ in range(2))
    assert second.starts == (7, 6)
    assert (session.positions, session.planned) == ((4, 4), (10, 8))
    session.settle(first.chunks[0])
    assert (session.positions, session.planned) == ((7, 6), (10, 8))
    with pytest.raises(InvalidStepError, match="behind others"):
        session.begin([1, 1], None, "last", chunk_rows=100, sources=[1, 0])


def test_steps_that_are_called_back_give_their_positions_but_not_their_numbers():
    session = session_steps()
    run(session, 4)
    kept, *dead = (session.begin([3], None, "all", chunk_rows=2) for _ in range(3))
    assert session.abandon(dead) == Recall(dead[0].first, session.next_step)
    assert (session.positions, session.planned) == ((4,), (7,))
    following = session.begin([1], None, "last", chunk_rows=100)
    assert following.starts == (7,) and following.first == dead[1].chunks[-1].step + 1
    for chunk in (*kept.chunks, *following.chunks):
        session.settle(chunk)
    assert session.positions == (8,)


def test_what_is_under_way_builds_on_all_that_has_come_back():
    session = session_steps()
    run(session, 9)
    kept = session.begin([3], None, "all", chunk_rows=100)
    dead = session.begin([2], [5], "all", chunk_rows=100)
    session.abandon([dead])
    assert session.planned == (5,), "some stages may have rolled back"
    assert session.positions == (9,), "others need it before they can go on with what is under way"
    session.settle(kept.chunks[0])
    assert session.positions == session.planned == (5,)


def test_a_step_that_has_come_back_is_called_back_all_the_same():
    session = session_steps()
    run(session, 4)
    early = run(session, 3, starts=[2])
    session.abandon([early])
    assert session.positions == session.planned == (2,)
