"""The engine on a counting executor: right results, whatever is batched, cut, rolled back or refused."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InputError,
    InvalidStepError,
    RemoteFaultError,
    ServerDrainingError,
    SessionLostError,
    SpanError,
    SwarmError,
    TooManyCallsError,
    UnknownCodecError,
)
from swarmcore.executor.base import Segment, SequenceId, Slice
from swarmcore.executor.engine import Engine
from swarmcore.testing import clock
from swarmcore.testing.executor import CountingExecutor, Rows, hidden_states, read_rows
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

WIDTH = 4


@asynccontextmanager
async def running(
    *, cache_tokens: int = 400, page: int = 4, **options: Any
) -> AsyncIterator[tuple[Engine, CountingExecutor]]:
    executor = CountingExecutor(page=page, tokens=cache_tokens)
    engine = Engine(executor, cache_tokens=cache_tokens, **options)
    await engine.start()
    try:
        yield engine, executor
    finally:
        await engine.close()
        await executor.close()
    assert executor.reserved_tokens == 0


@pytest.fixture(autouse=True)
def engine_never_crashes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The engine's task reports its own crash in the log and nowhere else."""
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelname == "CRITICAL"] == []


def some_rows(count: int, seed: int = 0) -> Rows:
    random_ = random.Random(seed)
    return read_rows(hidden_states([[random_.uniform(-1, 1) for _ in range(WIDTH)] for _ in range(count)]))


async def expected(rows: Rows, span: Span | None = None) -> Rows:
    """What a sequence of these rows gives when nothing else happens."""
    executor = CountingExecutor()
    executor.reserve(SequenceId(0), 4 * len(rows))
    segments = (Segment(SequenceId(0), 0, len(rows)),)
    [result] = await executor.step([Slice(hidden_states(rows), 0, span or executor.span, segments)])
    assert isinstance(result, Tensor)
    return read_rows(result)


def submit(
    engine: Engine, session: str, start: int, rows: Rows, *, timeout: float = 10.0
) -> asyncio.Future[Tensor]:
    return engine.step(session, (start,), (len(rows),), hidden_states(rows), timeout=timeout)


async def run(engine: Engine, session: str, start: int, rows: Rows) -> Rows:
    return read_rows(await submit(engine, session, start, rows))


# --- results -----------------------------------------------------------------------------------------------


async def test_prefill_then_decode_then_rollback() -> None:
    async with running() as (engine, _):
        rows, other = some_rows(9), some_rows(3, seed=1)
        await engine.open("a", 1, 0, timeout=1.0)
        assert await run(engine, "a", 0, rows[:7]) == (await expected(rows))[:7]
        assert await run(engine, "a", 7, rows[7:8]) == (await expected(rows))[7:8]
        assert await run(engine, "a", 8, rows[8:]) == (await expected(rows))[8:]
        assert engine.length("a") == (9,)
        assert await run(engine, "a", 4, other) == (await expected(rows[:4] + other))[4:]
        assert engine.length("a") == (7,)
        assert engine.cache_tokens_used == 8


async def test_a_long_step_is_run_in_parts_and_put_together() -> None:
    async with running(max_batch_tokens=5) as (engine, executor):
        rows = some_rows(23)
        await engine.open("a", 1, 0, timeout=1.0)
        assert await run(engine, "a", 0, rows) == await expected(rows)
        assert max(sum(tokens) for tokens in executor.batches) <= 5


@pytest.mark.parametrize("max_batch_tokens", [4, 512])
async def test_reply_last_gives_a_row_for_each_sequence_that_has_any(max_batch_tokens: int) -> None:
    async with running(max_batch_tokens=max_batch_tokens) as (engine, _):
        first, third = some_rows(6, seed=1), some_rows(3, seed=2)
        await engine.open("a", 3, 0, timeout=1.0)
        result = await engine.step(
            "a", (0, 0, 0), (6, 0, 3), hidden_states(first + third), reply="last", timeout=5.0
        )
        assert read_rows(result) == [(await expected(first))[-1], (await expected(third))[-1]]
        assert engine.length("a") == (6, 0, 3)


@pytest.mark.parametrize("max_batch_tokens", [4, 512])
async def test_hidden_states_come_and_go_in_a_codec(max_batch_tokens: int) -> None:
    async with running(max_batch_tokens=max_batch_tokens) as (engine, _):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)
        hidden = hidden_states(rows).encode("raw+zstd")
        result = await engine.step("a", (0,), (6,), hidden, codec="raw+zstd", timeout=5.0)
        assert result.codec == "raw+zstd"
        assert read_rows(result) == await expected(rows)


async def test_steps_in_line_need_not_wait_for_each_other() -> None:
    async with running() as (engine, _):
        rows = some_rows(12)
        await engine.open("a", 1, 0, timeout=1.0)
        answers = [submit(engine, "a", start, rows[start : start + 4]) for start in (0, 4, 8)]
        assert engine.length("a") == (0,)
        results = [row for answer in answers for row in read_rows(await answer)]
        assert results == await expected(rows)


async def test_decode_steps_of_one_moment_share_a_batch() -> None:
    async with running() as (engine, executor):
        for name in "abc":
            await engine.open(name, 1, 0, timeout=1.0)

        async def generate(name: str) -> None:
            for position in range(5):
                await submit(engine, name, position, some_rows(1))

        await asyncio.gather(*(generate(name) for name in "abc"))
        assert list(executor.batches) == [(1, 1, 1)] * 5
        assert engine.stats.mean_batch == 3.0 and engine.counters["steps"] == 15.0


async def test_sessions_of_a_part_of_the_span() -> None:
    async with running() as (engine, _):
        rows, part = some_rows(3), Span(2, 5)
        await engine.open("a", 1, 0, timeout=1.0, span=part)
        await engine.open("b", 1, 0, timeout=1.0)
        partial, whole = submit(engine, "a", 0, rows), submit(engine, "b", 0, rows)
        assert read_rows(await partial) == await expected(rows, part)
        assert read_rows(await whole) == await expected(rows)
        with pytest.raises(SpanError, match="blocks 3:13 are not all here: this server holds 0:12"):
            await engine.open("c", 1, 0, timeout=1.0, span=Span(3, 13))


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_sessions_gives_what_each_alone_would(seed: int) -> None:
    random_ = random.Random(seed)

    async def session(engine: Engine, name: str, random_: random.Random) -> None:
        rows: Rows = []
        await engine.open(name, 1, 0, timeout=100.0)
        for _ in range(random_.randint(1, 12)):
            start = random_.randint(0, len(rows)) if random_.random() < 0.3 else len(rows)
            new = some_rows(random_.choice([1, 1, 1, 3, 17]), seed=random_.randrange(99))
            rows = rows[:start] + new
            assert await run(engine, name, start, new) == (await expected(rows))[start:]
            await asyncio.sleep(random_.choice([0, 0, 0.1]))
        engine.close_session(name)

    async def scenario() -> None:
        options = {"max_batch_tokens": random_.choice([3, 8, 64])}
        async with running(cache_tokens=random_.choice([600, 2000]), **options) as (engine, executor):
            names = [f"session {n}" for n in range(8)]
            await asyncio.gather(*(session(engine, name, random.Random(f"{seed} {name}")) for name in names))
            assert engine.sessions == 0 and engine.cache_tokens_used == executor.reserved_tokens == 0

    clock.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_clients_that_start_over_all_finish_however_tight_the_cache(seed: int) -> None:
    """Far more sessions than there is room for: none waits for ever, and every answer is right."""

    async def generate(engine: Engine, name: str, rows: Rows, whole: Rows) -> None:
        length = 0
        while length < len(rows):
            count = 9 if length == 0 else 1
            part = rows[length : length + count]
            assert await run(engine, name, length, part) == whole[length : length + count]
            length += len(part)
            await asyncio.sleep(0.05)

    async def client(engine: Engine, random_: random.Random, number: int) -> None:
        rows = some_rows(random_.randint(1, 60), seed=number)
        whole = await expected(rows)
        for attempt in range(200):
            name = f"{number}.{attempt}"
            try:
                await engine.open(name, 1, 9, timeout=20.0)
                await generate(engine, name, rows, whole)
                return
            except CacheFullError as exc:
                assert exc.retry_after < math.inf
                await asyncio.sleep(exc.retry_after)
            except SessionLostError:
                pass
            finally:
                engine.close_session(name)
        raise AssertionError("a client never got through")

    async def scenario() -> None:
        random_ = random.Random(seed)
        async with running(cache_tokens=100, max_batch_tokens=8, idle_grace=1.0) as (engine, _):
            await asyncio.gather(*(client(engine, random_, number) for number in range(12)))
            assert engine.sessions == 0 and engine.cache_tokens_used == 0

    clock.run(scenario())


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"session": "b"}, SessionLostError, "no session b here"),
        ({"starts": (0,)}, InvalidStepError, "1 starts and 2 lengths; expected 2 of each"),
        ({"starts": (3, 0)}, InvalidStepError, "sequence 0 starts at position 3, ahead of its 2 cached"),
        ({"starts": (-1, 0)}, InvalidStepError, "sequence 0 has start -1"),
        ({"lengths": (3, -1)}, InvalidStepError, "sequence 1 has start 0 and length -1"),
        ({"lengths": (0, 0)}, InvalidStepError, "the step has 0 tokens; expected 1 to 64"),
        ({"lengths": (65, 0)}, InvalidStepError, "the step has 65 tokens; expected 1 to 64"),
        ({"lengths": (2, 2)}, InvalidStepError, r"shape \[2, 4\]; expected \[4, 4\]"),
        ({"hidden": hidden_states([[0.0] * 3] * 2)}, InvalidStepError, r"shape \[2, 3\]; expected \[2, 4\]"),
        (
            {"hidden": Tensor("hidden", "int32", (2, 4), memoryview(bytes(32)))},
            InvalidStepError,
            "dtype 'int32'; expected float32, float16, bfloat16",
        ),
        (
            {"hidden": Tensor("hidden", "float32", (2, 4), memoryview(bytes(31)))},
            InvalidStepError,
            "hold 31 bytes; expected 32",
        ),
        (
            {"hidden": Tensor("hidden", "float32", (2, 4), memoryview(bytes(3)), "zip")},
            UnknownCodecError,
            "'zip' is not known",
        ),
        ({"codec": "raw+gzip"}, UnknownCodecError, "raw.gzip.*expected one of raw"),
        ({"reply": "first"}, InvalidStepError, "'first' rows; expected 'all' or 'last'"),
        ({"timeout": math.nan}, InvalidStepError, "timeout is not a number"),
    ],
)
async def test_what_is_wrong_with_a_step_is_said_at_once(
    change: dict[str, Any], error: type[SwarmError], message: str
) -> None:
    async with running(max_step_tokens=64) as (engine, _):
        await engine.open("a", 2, 0, timeout=1.0)
        await engine.step("a", (0, 0), (2, 0), hidden_states(some_rows(2)), timeout=5.0)
        step: dict[str, Any] = {"session": "a", "starts": (2, 0), "lengths": (1, 1), "timeout": 5.0}
        step |= {"hidden": hidden_states(some_rows(2))} | change
        with pytest.raises(error, match=message):
            engine.step(**step)
        # Nothing has changed.
        assert engine.length("a") == (2, 0)
        await engine.step("a", (2, 0), (1, 1), hidden_states(some_rows(2)), timeout=5.0)


async def test_what_is_wrong_with_a_session_is_said_at_once() -> None:
    async with running(max_sequences=8) as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        with pytest.raises(InputError, match="session a is open already"):
            await engine.open("a", 1, 0, timeout=1.0)
        with pytest.raises(InputError, match="9 sequences; expected 1 to 8"):
            await engine.open("b", 9, 0, timeout=1.0)
        with pytest.raises(InputError, match="-1 cache tokens"):
            await engine.open("b", 1, -1, timeout=1.0)
        with pytest.raises(CacheFullError, match="has 400 in all"):
            await engine.open("b", 1, 401, timeout=1.0)
        assert engine.sessions == 1


async def test_the_line_of_a_session_is_bounded() -> None:
    async with running(max_pending_steps=2, max_pending_tokens=8) as (engine, executor):
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 0, timeout=1.0)
        await engine.open("b", 1, 0, timeout=1.0)
        answers = [submit(engine, "a", n, some_rows(1)) for n in range(2)]
        with pytest.raises(TooManyCallsError, match="2 steps of the session wait"):
            submit(engine, "a", 2, some_rows(1))
        with pytest.raises(TooManyCallsError, match="2 tokens wait to be computed"):
            submit(engine, "b", 0, some_rows(7))
        answers.append(submit(engine, "b", 0, some_rows(6)))
        executor.gate.set()
        await asyncio.gather(*answers)


# --- what fails --------------------------------------------------------------------------------------------


async def test_bad_values_hurt_nobody_else_and_leave_the_session_as_it_was() -> None:
    async with running() as (engine, _):
        rows = some_rows(5)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:4])
        bad, fine = submit(engine, "a", 4, [[math.nan] * WIDTH]), submit(engine, "b", 4, rows[4:])
        with pytest.raises(InvalidStepError, match="not finite"):
            await bad
        assert read_rows(await fine) == (await expected(rows))[4:]
        assert engine.length("a") == (4,)
        assert await run(engine, "a", 4, rows[4:]) == (await expected(rows))[4:]


async def test_steps_that_build_on_a_failed_one_fail_like_it() -> None:
    async with running() as (engine, _):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, rows[:2])
        failed = submit(engine, "a", 2, [[math.nan] * WIDTH] * 2)
        orphans = [submit(engine, "a", 4, rows[4:5]), submit(engine, "a", 5, rows[5:])]
        rollback = submit(engine, "a", 1, rows[1:])
        for answer in (failed, *orphans):
            with pytest.raises(InvalidStepError, match="not finite"):
                await answer
        with pytest.raises(
            InvalidStepError, match="an earlier step of the session, which this one builds on"
        ):
            await orphans[0]
        # What was in line behind them and does not need them is computed.
        assert read_rows(await rollback) == (await expected(rows))[1:]
        assert engine.length("a") == (6,)


async def test_a_long_step_that_fails_half_way_leaves_nothing_behind() -> None:
    async with running(max_batch_tokens=4) as (engine, executor):
        rows = some_rows(14)
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, rows[:6])
        used = engine.cache_tokens_used
        with pytest.raises(InvalidStepError, match="not finite"):
            await submit(engine, "a", 4, [*rows[4:12], [math.nan] * WIDTH])
        # The step had rolled the sequence back to where it starts.
        assert engine.length("a") == (4,)
        assert engine.cache_tokens_used <= used and executor.reserved_tokens <= used
        assert await run(engine, "a", 4, rows[4:]) == (await expected(rows))[4:]


async def test_a_failing_executor_fails_its_batch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (engine, executor):
        rows = some_rows(2)
        await engine.open("a", 1, 0, timeout=1.0)
        executor.failures.append(ValueError("secret detail"))
        with pytest.raises(RemoteFaultError, match=r"executor failed \(ValueError\); its log"):
            await submit(engine, "a", 0, rows)
        assert "secret detail" in caplog.text
        executor.failures.append(CacheFullError("out of memory", retry_after=3.0))
        with pytest.raises(CacheFullError) as caught:
            await submit(engine, "a", 0, rows)
        assert caught.value.retry_after == 3.0
        assert await run(engine, "a", 0, rows) == await expected(rows)
        assert engine.stats.steps_failed == 2


async def test_a_result_that_cannot_be_encoded_fails_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(max_batch_tokens=4) as (engine, executor):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)

        async def encode(tensor: Tensor, codec: str) -> Tensor:
            raise MemoryError

        monkeypatch.setattr(executor, "encode", encode)
        with pytest.raises(RemoteFaultError, match="MemoryError"):
            await engine.step("a", (0,), (6,), hidden_states(rows), codec="raw+zstd", timeout=5.0)
        assert await run(engine, "a", 0, rows) == await expected(rows)


async def test_a_cancelled_step_is_withdrawn() -> None:
    async with running() as (engine, executor):
        rows = some_rows(4)
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 0, timeout=1.0)
        await engine.open("b", 1, 0, timeout=1.0)
        computing = submit(engine, "a", 0, rows[:2])
        while not executor.computing:
            await asyncio.sleep(0)
        queued, behind = submit(engine, "b", 0, rows), submit(engine, "b", 4, rows)
        queued.cancel()
        computing.cancel()
        with pytest.raises(InvalidStepError, match="cancelled by its caller"):
            await behind
        again = submit(engine, "a", 0, rows)
        executor.gate.set()
        assert read_rows(await again) == await expected(rows)
        assert engine.length("b") == (0,)
        assert list(executor.batches) == [(2,), (4,)]


def test_a_step_is_answered_by_its_deadline_even_while_the_executor_hangs() -> None:
    async def scenario() -> None:
        async with running() as (engine, executor):
            rows = some_rows(2)
            executor.gate = asyncio.Event()
            await engine.open("a", 1, 0, timeout=1.0)
            await engine.open("b", 1, 0, timeout=1.0)
            computing = submit(engine, "a", 0, rows, timeout=5.0)
            await asyncio.sleep(1.0)
            queued = submit(engine, "b", 0, rows, timeout=2.0)
            for answer, end in ((queued, 3.0), (computing, 5.0)):
                with pytest.raises(DeadlineExceededError, match="2 tokens was not computed by its deadline"):
                    await answer
                assert asyncio.get_running_loop().time() == pytest.approx(end)
            later = submit(engine, "b", 0, rows, timeout=10.0)
            executor.gate.set()
            assert read_rows(await later) == await expected(rows)
            assert await run(engine, "a", 0, rows) == await expected(rows)

    clock.run(scenario())


# --- room --------------------------------------------------------------------------------------------------


async def test_a_new_session_is_let_in_when_another_ends() -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 16, timeout=1.0)
        assert (engine.cache_tokens_free, engine.cache_tokens_used) == (0, 16)
        second = asyncio.create_task(engine.open("b", 1, 8, timeout=60.0))
        await asyncio.sleep(0)
        assert not second.done()
        engine.close_session("a")
        await second
        assert engine.cache_tokens_free == 8


def test_admission_gives_up_at_its_deadline() -> None:
    async def scenario() -> None:
        async with running(cache_tokens=16, idle_timeout=100.0) as (engine, _):
            await engine.open("a", 1, 16, timeout=1.0)
            with pytest.raises(CacheFullError, match="no room came free for a new session") as caught:
                await engine.open("b", 1, 8, timeout=20.0)
            assert asyncio.get_running_loop().time() == pytest.approx(20.0)
            assert caught.value.retry_after == pytest.approx(80.0)
            assert engine.stats.refusals == 1
            # The name was not used up, and the wait was long enough now.
            await engine.open("b", 1, 8, timeout=90.0)
            assert asyncio.get_running_loop().time() == pytest.approx(100.0)

    clock.run(scenario())


@pytest.mark.parametrize("freed_first", [False, True])
async def test_a_cancelled_open_holds_nothing(freed_first: bool) -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 16, timeout=1.0)
        waiting = asyncio.create_task(engine.open("b", 1, 8, timeout=60.0))
        await asyncio.sleep(0)
        if freed_first:
            engine.close_session("a")
            waiting.cancel()
        else:
            waiting.cancel()
            engine.close_session("a")
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (engine.sessions, engine.cache_tokens_free) == (0, 16)


async def test_a_step_waits_for_room_and_runs_when_it_comes() -> None:
    async with running(cache_tokens=16) as (engine, _):
        rows = some_rows(12)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:8])
        growing = submit(engine, "a", 8, rows[8:])
        behind = submit(engine, "a", 12, rows[:1])
        await asyncio.sleep(0)
        assert not growing.done()
        behind.cancel()
        engine.close_session("b")
        assert read_rows(await growing) == (await expected(rows))[8:]


def test_a_step_gives_up_waiting_for_room_at_its_deadline() -> None:
    async def scenario() -> None:
        async with running(cache_tokens=16, idle_grace=600.0) as (engine, _):
            for name in "ab":
                await engine.open(name, 1, 0, timeout=1.0)
                await run(engine, name, 0, some_rows(8))
            with pytest.raises(CacheFullError, match="no room came free for the session to grow") as caught:
                await submit(engine, "a", 8, some_rows(1), timeout=7.0)
            assert asyncio.get_running_loop().time() == pytest.approx(7.0)
            assert caught.value.retry_after == pytest.approx(593.0)
            assert engine.length("a") == (8,)
            # What needs no room goes on.
            await run(engine, "a", 7, some_rows(1))

    clock.run(scenario())


async def test_when_all_wait_for_room_the_youngest_session_makes_it() -> None:
    async with running(cache_tokens=16) as (engine, _):
        rows = some_rows(9)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:8])
        older, younger = submit(engine, "a", 8, rows[8:]), submit(engine, "b", 8, rows[8:])
        assert read_rows(await older) == (await expected(rows))[8:]
        with pytest.raises(SessionLostError, match="session b was ended: the server needed its room"):
            await younger
        assert engine.sessions == 1 and engine.stats.sessions_evicted == 1


def test_idle_sessions_expire_and_busy_ones_do_not() -> None:
    async def scenario() -> None:
        async with running(idle_timeout=60.0) as (engine, _):
            for name in ("idle", "busy"):
                await engine.open(name, 1, 40, timeout=1.0)
            for position in range(10):
                await run(engine, "busy", position, some_rows(1))
                await asyncio.sleep(10.0)
            with pytest.raises(SessionLostError, match="open a new one and replay"):
                submit(engine, "idle", 0, some_rows(1))
            assert engine.length("busy") == (10,)
            assert engine.cache_tokens_used == 40

    clock.run(scenario())


async def test_a_step_above_the_whole_cache_fails_and_the_session_goes_on() -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        with pytest.raises(CacheFullError, match="has 16 in all") as caught:
            await submit(engine, "a", 0, some_rows(17))
        assert caught.value.retry_after == math.inf
        await run(engine, "a", 0, some_rows(16))


# --- endings -----------------------------------------------------------------------------------------------


async def test_closing_a_session_frees_its_cache_at_once() -> None:
    async with running() as (engine, executor):
        await engine.open("a", 2, 0, timeout=1.0)
        await engine.step("a", (0, 0), (5, 5), hidden_states(some_rows(10)), timeout=5.0)
        assert engine.cache_tokens_used == executor.reserved_tokens == 16
        engine.close_session("a")
        engine.close_session("a")
        assert engine.cache_tokens_used == executor.reserved_tokens == 0
        with pytest.raises(SessionLostError):
            engine.length("a")


async def test_closing_a_computing_session_frees_its_cache_after_the_batch() -> None:
    async with running() as (engine, executor):
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 0, timeout=1.0)
        answer = submit(engine, "a", 0, some_rows(6))
        while not executor.computing:
            await asyncio.sleep(0)
        engine.close_session("a")
        with pytest.raises(SessionLostError, match="was closed"):
            await answer
        assert engine.sessions == 0 and engine.cache_tokens_used == 8
        # The name is free again, and is another session.
        await engine.open("a", 1, 0, timeout=1.0)
        again = submit(engine, "a", 0, some_rows(2))
        executor.gate.set()
        assert read_rows(await again) == await expected(some_rows(2))
        assert engine.cache_tokens_used == executor.reserved_tokens == 4


async def test_closing_the_engine_ends_everything() -> None:
    async with running(cache_tokens=16) as (engine, executor):
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 16, timeout=1.0)
        opening = asyncio.create_task(engine.open("b", 1, 16, timeout=60.0))
        computing, queued = submit(engine, "a", 0, some_rows(2)), submit(engine, "a", 2, some_rows(2))
        while not executor.computing:
            await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(ServerDrainingError):
            await opening
        for answer in (computing, queued):
            with pytest.raises(SessionLostError, match="shutting down"):
                await answer
        assert not closing.done()
        executor.gate.set()
        await closing
        await engine.close()
        with pytest.raises(ServerDrainingError):
            await engine.open("c", 1, 0, timeout=1.0)
        with pytest.raises(SessionLostError):
            submit(engine, "a", 0, some_rows(1))


def test_an_idle_engine_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(idle_timeout=600.0) as (engine, executor):
            loop = asyncio.get_running_loop()
            await engine.open("a", 1, 0, timeout=1.0)
            await run(engine, "a", 0, some_rows(4))
            calls = 0
            call_at = loop.call_at

            def counting(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
                nonlocal calls
                calls += 1
                return call_at(*args, **kwargs)

            monkeypatch.setattr(loop, "call_at", counting)
            await asyncio.sleep(3600.0)
            assert calls <= 4
            assert len(executor.batches) == 1 and engine.sessions == 0

    clock.run(scenario())


async def test_repr_shows_the_state() -> None:
    async with running() as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(4))
        assert repr(engine) == (
            "<Engine 0:12 · 1 sessions · cache 4/400 · 0 tokens pending · 1 steps in 1 batches>"
        )
