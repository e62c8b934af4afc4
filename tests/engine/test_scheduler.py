"""How steps become batches, and how the parts of a step become its result."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.engine.scheduler import ScheduledBatch, Scheduler
from swarmcore.engine.step import PendingStep
from swarmcore.errors import InputError, InternalError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

SPAN = Span(0, 4)
_sequences = iter(range(10**9))


def pending(
    *counts: int,
    reply: Literal["all", "last"] = "all",
    deadline: float = 100.0,
    span: Span = SPAN,
    codec: str = "raw",
    start: int = 0,
) -> PendingStep:
    segments = tuple(Segment(SequenceId(next(_sequences)), start, count) for count in counts)
    hidden = hidden_states([[float(row), 0.0] for row in range(sum(counts))])
    return PendingStep(span, segments, hidden, reply, codec, deadline)


def answer(chunk: ScheduledChunk) -> Tensor:
    """Run a chunk: each row comes back as it was."""
    rows = read_rows(chunk.hidden)[chunk.first_row : chunk.first_row + chunk.tokens]
    if chunk.reply == "last":
        ends, end = [], 0
        for segment in chunk.segments:
            end += segment.count
            ends.append(rows[end - 1])
        rows = ends
    return hidden_states(rows)


def run(batch: ScheduledBatch[PendingStep]) -> list[PendingStep]:
    for step, chunk in zip(batch.steps, batch.chunks, strict=True):
        step.put(answer(chunk))
    return [step for step in batch.steps if step.finished]


def test_decode_comes_before_prefill_in_one_batch() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(16)
    prefill, one, two = pending(100), pending(1), pending(1, 1)
    for step in (prefill, one, two):
        scheduler.add(step)
    batch = scheduler.schedule(0.0)
    assert batch.steps == [one, two, prefill]
    assert [chunk.tokens for chunk in batch.chunks] == [1, 2, 13]
    assert batch.tokens == 16 and not batch.decode_only
    assert len(scheduler) == 1


def test_a_few_drafted_rows_go_with_the_decode_steps_and_in_one_piece() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(16)
    prompt, one, drafted = pending(5), pending(1), pending(5, 3, start=10)
    behind, long = pending(6, start=10), pending(17, start=10)
    for step in (prompt, one, drafted, behind, long):
        scheduler.add(step)
    assert scheduler.decode_waiting == (None, 0), "prompts wait, and the long one is like one"
    batch = scheduler.schedule(0.0)
    assert [(step, chunk.tokens) for step, chunk in zip(batch.steps, batch.chunks, strict=True)] == [
        (one, 1),
        (drafted, 8),
        (prompt, 5),
        (long, 2),
    ], "what has no room for all of its drafts waits"
    assert scheduler.schedule(0.0).steps[0] is behind


def test_prefills_take_turns() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    long, short = pending(40), pending(6)
    scheduler.add(long)
    scheduler.add(short)
    order = []
    while len(scheduler):
        batch = scheduler.schedule(0.0)
        order.append(
            [(step is long, chunk.tokens) for step, chunk in zip(batch.steps, batch.chunks, strict=True)]
        )
        run(batch)
    assert order[:2] == [[(True, 8)], [(False, 6), (True, 2)]]
    assert long.finished and short.finished


def test_decode_never_takes_all_of_a_batch_from_prefill() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(16)
    prefill = pending(20)
    scheduler.add(prefill)
    for _ in range(10):
        for _ in range(16):
            scheduler.add(pending(1))
        batch = scheduler.schedule(0.0)
        assert batch.tokens <= 16
        run(batch)
    assert prefill.finished


def test_decode_steps_that_do_not_fit_come_first_the_next_time() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    steps = [pending(*[1] * 5) for _ in range(3)]
    for step in steps:
        scheduler.add(step)
    assert [scheduler.schedule(0.0).steps for _ in range(3)] == [[step] for step in steps]


def test_a_decode_step_wider_than_a_batch_is_cut() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(4)
    step = pending(*[1] * 10)
    scheduler.add(step)
    tokens = []
    while len(scheduler):
        batch = scheduler.schedule(0.0)
        tokens.append(batch.tokens)
        run(batch)
    assert tokens == [4, 4, 2]
    assert [row[0] for row in read_rows(step.result())] == [float(n) for n in range(10)]


def test_a_cut_step_keeps_its_positions_and_rows() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(6)
    step = pending(4, 5)
    first, second = (segment.sequence for segment in step.segments)
    scheduler.add(step)
    one, two = scheduler.schedule(0.0).chunks[0], scheduler.schedule(0.0).chunks[0]
    assert (one.first_row, one.segments) == (0, (Segment(first, 0, 4), Segment(second, 0, 2)))
    assert (two.first_row, two.segments) == (6, (Segment(second, 2, 3),))
    assert one.hidden is two.hidden is step.hidden


def test_a_whole_step_is_answered_in_its_codec_and_parts_come_raw() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(6)
    small, large = pending(2, codec="raw+zstd"), pending(9, codec="raw+zstd")
    scheduler.add(small)
    scheduler.add(large)
    batch = scheduler.schedule(0.0)
    assert [chunk.codec for chunk in batch.chunks] == ["raw+zstd", "raw"]
    run(batch)
    assert small.whole and not large.whole


def test_cancelled_steps_are_forgotten() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    cut, queued = pending(12), pending(1)
    scheduler.add(cut)
    run(scheduler.schedule(0.0))
    scheduler.add(queued)
    scheduler.remove(cut)
    scheduler.remove(queued)
    scheduler.remove(queued)
    assert len(scheduler) == 0 and scheduler.schedule(0.0).steps == []


def test_expired_steps_are_dropped_not_computed() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    late, cut, fine = pending(1, deadline=5.0), pending(12, deadline=6.0), pending(1)
    for step in (late, cut, fine):
        scheduler.add(step)
    assert scheduler.schedule(4.0).steps == [late, fine, cut]
    scheduler.add(pending(1, deadline=6.0))
    batch = scheduler.schedule(6.0)
    assert batch.steps == [] and cut in batch.expired and len(batch.expired) == 2
    assert len(scheduler) == 0


def test_a_batch_is_of_one_span_and_decode_decides_which() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    front, back = Span(0, 2), Span(2, 4)
    prefill, decode, other = pending(20, span=front), pending(1, span=back), pending(1, span=front)
    scheduler.add(prefill)
    scheduler.add(decode)
    assert scheduler.schedule(0.0).steps == [decode]
    scheduler.add(other)
    assert scheduler.schedule(0.0).steps == [other, prefill]


def test_no_span_starves() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    spans = [Span(0, 1), Span(0, 2), Span(0, 3)]
    prefill = pending(8, span=spans[2])
    scheduler.add(prefill)
    served = []
    for _ in range(12):
        for span in spans[:2]:
            scheduler.add(pending(1, span=span))
        batch = scheduler.schedule(0.0)
        served.append(batch.chunks[0].span)
        run(batch)
    assert prefill.finished
    assert all(served.count(span) >= 4 for span in spans[:2])


def test_a_result_of_another_size_is_a_bug_of_the_executor() -> None:
    step = pending(3)
    step.take(8)
    with pytest.raises(InternalError, match="answered 3 rows with a tensor of shape"):
        step.put(hidden_states([[0.0, 0.0]]))


def test_a_batch_has_room_for_more_than_a_token() -> None:
    with pytest.raises(InputError, match="max_batch_tokens is 1"):
        Scheduler(1)


def test_repr_shows_the_state() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    scheduler.add(pending(1))
    scheduler.add(pending(12))
    assert repr(scheduler) == "<Scheduler 1 decode · 1 prefill (12 tokens)>"


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8),
    reply=st.sampled_from(["all", "last"]),
    budget=st.integers(2, 12),
)
def test_every_step_ends_and_has_its_own_rows(
    shapes: list[list[int]], reply: Literal["all", "last"], budget: int
) -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(budget)
    steps = [pending(*counts, reply=reply) for counts in shapes]
    for step in steps:
        scheduler.add(step)
    while len(scheduler):
        batch = scheduler.schedule(0.0)
        assert 0 < batch.tokens <= budget
        assert len(set(map(id, batch.steps))) == len(batch.steps)
        run(batch)
    for step, counts in zip(steps, shapes, strict=True):
        ends = [sum(counts[: n + 1]) - 1 for n in range(len(counts))]
        expected = range(sum(counts)) if reply == "all" else ends
        assert [row[0] for row in read_rows(step.result())] == [float(n) for n in expected]


class CallersStep(PendingStep):
    owner = ""

    @property
    def caller(self) -> str:
        return self.owner


def of(owner: str, *counts: int) -> PendingStep:
    plain = pending(*counts)
    step = CallersStep(plain.span, plain.segments, plain.hidden, plain.reply, plain.codec, plain.deadline)
    step.owner = owner
    return step


def test_callers_share_batches_whatever_each_has_in_line() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    crowd = [of("crowd", 1) for _ in range(100)]
    for step in crowd:
        scheduler.add(step)
    assert scheduler.schedule(0.0).steps == crowd[:8]
    modest = of("modest", 1)
    scheduler.add(modest)
    batch = scheduler.schedule(1.0)
    assert modest in batch.steps and batch.steps[:1] != [modest], "level with the others, and in order"
    wide = [of("wide", *[1] * 20) for _ in range(50)]
    for step in wide:
        scheduler.add(step)
    waits = []
    for number in range(20):
        mine = of("modest", 1)
        scheduler.add(mine)
        for turn in range(100):
            if mine in scheduler.schedule(2.0 + number).steps:
                waits.append(turn)
                break
    assert len(waits) == 20 and max(waits) <= 3


def test_prompts_of_one_caller_do_not_hold_up_another() -> None:
    scheduler: Scheduler[PendingStep] = Scheduler(8)
    for _ in range(50):
        scheduler.add(of("crowd", 1000))
    scheduler.schedule(0.0)
    mine = of("modest", 24)
    scheduler.add(mine)
    batches = 0
    while mine.left:
        scheduler.schedule(1.0)
        batches += 1
    assert batches <= 6, "three of its own, and about as many of the other's"
