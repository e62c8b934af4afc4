"""The journal against a plain model of it: lists of rows that are reordered, cut and appended to."""

import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InvalidStepError, ProtocolError, SessionLostError
from swarmcore.session.journal import MAX_UNSETTLED, Journal, OutputHistory, RowHistory
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.wire.tensors import Tensor


@attrs.frozen
class Change:
    """What a step does to the rows."""

    step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...] = ()


def rows_of(*values: float):
    return hidden_states([[value, -value] for value in values])


def values_of(tensor) -> list[float]:
    return [row[0] for row in read_rows(tensor)]


@st.composite
def histories(draw) -> list[Change]:
    count = draw(st.integers(1, 3))
    lengths = [0] * count
    entries = []
    for step in range(draw(st.integers(1, 8))):
        sources = draw(st.just(()) | st.tuples(*[st.integers(0, count - 1)] * count))
        lengths = [lengths[source] for source in sources] or lengths
        starts = [draw(st.integers(0, length)) for length in lengths]
        added = [draw(st.integers(0, 4)) for _ in lengths]
        if any(added):
            entries.append(Change(step, tuple(starts), tuple(added), sources))
            lengths = [s + a if a else old for s, a, old in zip(starts, added, lengths, strict=True)]
        elif sources:
            lengths = [0] * count
            entries.append(Change(step, tuple(lengths), (1,) * count, sources))
            lengths = [1] * count
    return entries


def replayed(entries: list[Change]) -> tuple[list[list[float]], list]:
    """What the sequences hold after ``entries``, and the rows that came with each of them."""
    count = len(entries[0].starts) if entries else 1
    sequences: list[list[float]] = [[] for _ in range(count)]
    tensors, value = [], 0.0
    for entry in entries:
        sequences = [list(sequences[source]) for source in entry.sources] or sequences
        flat = []
        for sequence, start, length in zip(sequences, entry.starts, entry.lengths, strict=True):
            if length:
                del sequence[start:]
                new = [value + i for i in range(length)]
                value += length
                sequence += new
                flat += new
        tensors.append(rows_of(*flat))
    return sequences, tensors


@given(histories())
def test_a_lane_holds_what_the_steps_left(entries):
    expected, tensors = replayed(entries)
    history = RowHistory(len(expected))
    for entry, tensor in zip(entries, tensors, strict=True):
        history.apply(entry, tensor)
    assert history.lengths == tuple(map(len, expected))
    if any(expected):
        found = history.rows([0] * len(expected), history.lengths)
        assert values_of(found) == [value for sequence in expected for value in sequence]
        last = [max(length - 1, 0) for length in history.lengths]
        found = history.rows(last, [min(length, 1) for length in history.lengths])
        assert values_of(found) == [sequence[-1] for sequence in expected if sequence]


@given(histories(), st.randoms(use_true_random=False))
def test_rows_may_come_at_any_time_around_the_settling_of_their_step(entries, random):
    expected, tensors = replayed(entries)
    journal = Journal(len(expected), [4])
    arrivals = [("settle", i) for i in range(len(entries))]
    for i in range(len(entries)):  # rows come in their order, whatever is settled meanwhile
        after = arrivals.index(("rows", i - 1)) + 1 if i else 0
        arrivals.insert(random.randint(after, len(arrivals)), ("rows", i))
    for entry in entries:
        journal.begin(entry.step, sum(entry.lengths))
    for what, i in arrivals:
        if what == "settle":
            journal.settle(entries[i])
        else:
            assert journal.receive(4, entries[i].step, tensors[i])
    assert journal.complete(4)
    lengths = tuple(map(len, expected))
    if any(lengths):
        flat = [value for sequence in expected for value in sequence]
        assert values_of(journal.rows(4, [0] * len(lengths), lengths)) == flat


def test_rows_that_were_never_kept_are_not_made_up():
    history = RowHistory(2)
    history.apply(Change(0, (0, 0), (3, 0)), rows_of(1, 2, 3))
    with pytest.raises(InvalidStepError, match="rows 3 to 4 of sequence 0"):
        history.rows([0, 0], [4, 0])
    with pytest.raises(InvalidStepError, match="sequence 1"):
        history.rows([0, 0], [3, 1])


def test_a_reordered_lane_shares_its_tensors():
    history = RowHistory(3)
    history.apply(Change(0, (0, 0, 0), (2, 2, 2)), rows_of(1, 2, 3, 4, 5, 6))
    before = history.nbytes
    history.apply(Change(1, (2, 2, 2), (1, 1, 1), (1, 1, 0)), rows_of(7, 8, 9))
    assert history.nbytes == before + rows_of(7, 8, 9).data.nbytes
    assert values_of(history.rows([0, 0, 0], [3, 3, 3])) == [3, 4, 7, 3, 4, 8, 1, 2, 9]


def test_rows_of_a_step_that_was_given_up_are_not_taken():
    journal = Journal(1, [0])
    journal.begin(0, 1)
    assert journal.receive(0, 0, rows_of(1))
    journal.forget(0)
    assert not journal.has(0, 0)
    assert not journal.receive(0, 0, rows_of(1)), "it comes too late"
    assert not journal.receive(8, 0, rows_of(1)), "nobody keeps that place"


def test_what_a_dead_server_still_owed_is_computed_again():
    journal = Journal(2, [4])
    for step, rows in enumerate([3, 2, 1]):
        journal.begin(step, rows)
    journal.receive(4, 0, rows_of(1, 2, 3))
    journal.settle(Change(0, (0, 0), (2, 1)))
    journal.settle(Change(1, (2, 1), (1, 1)))
    assert not journal.complete(4)
    assert journal.rebuild(4, (3, 2)) == (2, 1), "rows from before the gap are good"
    journal.expect(4, Change(7, (2, 1), (1, 1)))
    assert not journal.complete(4)
    assert journal.receive(4, 7, rows_of(8, 9))
    assert journal.complete(4)
    assert values_of(journal.rows(4, (0, 0), (3, 2))) == [1, 2, 8, 3, 9]


def test_after_a_reordering_that_was_missed_nothing_is_good():
    journal = Journal(2, [4])
    for step in range(2):
        journal.begin(step, 2)
    journal.receive(4, 0, rows_of(1, 2))
    journal.settle(Change(0, (0, 0), (1, 1)))
    journal.settle(Change(1, (1, 1), (1, 1), sources=(1, 1)))
    assert journal.rebuild(4, (2, 2)) == (0, 0)


def test_only_the_places_that_are_wanted_are_kept():
    journal = Journal(1, [0, 4])
    journal.begin(0, 1)
    journal.receive(4, 0, rows_of(1))
    journal.settle(Change(0, (0,), (1,)))
    journal.keep_only([0])
    assert journal.blocks == {0}
    assert repr(journal) == "<Journal 0: 0>"


def test_what_rollbacks_leave_of_large_tensors_is_copied_out_of_them(monkeypatch):
    monkeypatch.setattr("swarmcore.session.journal.COMPACT_NBYTES", 1000)
    history = RowHistory(1)
    for step in range(200):  # each leaves one row of a hundred
        history.apply(Change(step, (step,), (100,)), rows_of(*range(step, step + 100)))
    assert history.lengths == (299,)
    row = rows_of(1).data.nbytes
    assert history.nbytes < 2 * 299 * row + 1000 + 2 * 100 * row
    assert values_of(history.rows([0], [299])) == list(range(299))


def test_rows_of_servers_that_compute_in_different_dtypes_are_made_alike():
    history = RowHistory(1)
    values = [1.5, -0.25, 3.0, 1024.0]
    for start, (dtype, width, pack) in enumerate(
        [("float32", 4, "<f"), ("bfloat16", 2, "<f"), ("float16", 2, "<e"), ("float32", 4, "<f")]
    ):
        data = bytearray(struct.pack(pack, values[start])[-width:])
        history.apply(Change(start, (start,), (1,)), Tensor("hidden", dtype, (1, 1), memoryview(data)))
    rows = history.rows([0], [4])
    assert (rows.dtype, rows.shape) == ("float32", (4, 1))
    assert list(struct.unpack("<4f", rows.data)) == values
    assert history.rows([1], [1]).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("starts", "lengths"), [((-1,), (1,)), ((0,), (-1,)), ((0, 0), (1, 1)), ((), ()), ((0,), (10**15,))]
)
def test_rows_that_cannot_be_are_refused(starts, lengths):
    history = RowHistory(1)
    history.apply(Change(0, (0,), (3,)), rows_of(1, 2, 3))
    with pytest.raises(InvalidStepError):
        history.rows(starts, lengths)


def test_rows_that_are_not_those_of_their_step_are_refused():
    journal = Journal(1, [4])
    journal.begin(0, 2)
    with pytest.raises(ProtocolError, match="3 rows of a step of 2"):
        journal.receive(4, 0, rows_of(1, 2, 3))
    assert journal.receive(4, 0, rows_of(1, 2))
    assert not journal.receive(4, 0, rows_of(8, 9)), "the first ones count"
    journal.settle(Change(0, (0,), (2,)))
    assert values_of(journal.rows(4, [0], [2])) == [1, 2]


def test_outputs_of_steps_that_never_get_through_are_given_up_in_their_order():
    kept = OutputHistory(1)
    for step in range(MAX_UNSETTLED + 3):
        kept.keep(Change(step, (0,), (1,)), rows_of(step))
    assert values_of(kept.settled.rows([0], [1])) == [2]
    kept.settle(MAX_UNSETTLED + 3)
    assert values_of(kept.settled.rows([0], [1])) == [MAX_UNSETTLED + 2]


def test_outputs_that_were_dropped_are_lost_and_take_nothing():
    kept = OutputHistory(1)
    kept.keep(Change(0, (0,), (2,)), rows_of(1, 2))
    kept.settle(1)
    kept.keep(Change(1, (2,), (1,)), rows_of(3))
    assert kept.nbytes == 3 * rows_of(1).data.nbytes
    kept.drop()
    kept.keep(Change(2, (3,), (1,)), rows_of(4))
    assert kept.nbytes == 0
    with pytest.raises(SessionLostError, match="make room"):
        kept.settled.rows((0,), (2,))


def test_outputs_of_steps_that_were_called_back_are_not_kept():
    kept = OutputHistory(1)
    for step in range(4):
        kept.keep(Change(step, (step,), (1,)), rows_of(step))
    kept.forget(1, 3)
    assert kept.nbytes == 2 * rows_of(0).data.nbytes
    kept.settle(2)
    assert kept.settled.lengths == (1,)
    kept.settle(4)
    assert values_of(kept.settled.rows([3], [1])) == [3]
