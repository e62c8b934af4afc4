"""Steps that reorder the caches of their session, as beam search does."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import pytest
from counting_engine import WIDTH, expected, run, running, some_rows, submit, submit_beams

from swarmcore.engine.engine import Engine
from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InvalidStepError,
    RemoteFaultError,
    SessionLostError,
)
from swarmcore.testing import clock
from swarmcore.testing.executor import Rows, read_rows


async def opened(engine: Engine, prompts: list[Rows], name: str = "a") -> None:
    await engine.open(name, len(prompts), 0, timeout=1.0)
    await submit_beams(engine, name, [0] * len(prompts), prompts)


@pytest.mark.parametrize("max_batch_tokens", [2, 512])
async def test_sequences_go_on_as_copies_of_others(max_batch_tokens: int) -> None:
    async with running(max_batch_tokens=max_batch_tokens) as (engine, _):
        prompts = [some_rows(4 + n, seed=n) for n in range(3)]
        tails = [some_rows(1, seed=10 + n) for n in range(3)]
        await opened(engine, prompts)
        result = await submit_beams(engine, "a", [6, 4, 4], tails, (2, 0, 0))
        whole = [prompts[source] + tail for source, tail in zip((2, 0, 0), tails, strict=True)]
        assert read_rows(result) == [(await expected(rows))[-1] for rows in whole]
        assert engine.length("a") == (7, 5, 5)


async def test_starts_count_from_the_reordered_lengths() -> None:
    async with running() as (engine, _):
        prompts, tail = [some_rows(2), some_rows(7, seed=1)], some_rows(2, seed=2)
        await opened(engine, prompts)
        with pytest.raises(InvalidStepError, match="sequence 1 starts at position 7, ahead of its 2 cached"):
            submit_beams(engine, "a", [7, 7], [tail, tail], (1, 0))
        # One rolls back into its copy, the other is left as long as its source was.
        result = await submit_beams(engine, "a", [3, 0], [tail, []], (1, 0))
        assert read_rows(result) == (await expected(prompts[1][:3] + tail))[3:]
        assert engine.length("a") == (5, 2)
        result = await submit_beams(engine, "a", [0, 2], [[], tail])
        assert read_rows(result) == (await expected(prompts[0] + tail))[2:]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((0,), "the step has 1 sources; expected 2"),
        ((0, 2), "sequence 2 cannot be copied: the session has sequences 0 to 1"),
        ((-1, 0), "sequence -1 cannot be copied"),
    ],
)
async def test_sources_that_cannot_be(sources: tuple[int, ...], message: str) -> None:
    async with running() as (engine, _):
        await opened(engine, [some_rows(1), some_rows(1)])
        with pytest.raises(InvalidStepError, match=message):
            submit_beams(engine, "a", [1, 1], [some_rows(1)] * 2, sources)
        assert engine.length("a") == (1, 1)


@pytest.mark.parametrize("seed", range(8))
def test_beams_under_batches_are_what_each_alone_would_be(seed: int) -> None:
    async def search(engine: Engine, name: str, random_: random.Random) -> None:
        beams: list[Rows] = [some_rows(random_.randint(1, 9), seed=n) for n in range(3)]
        await opened(engine, beams, name)
        pending = []
        for _ in range(random_.randint(3, 12)):
            sources = [random_.randrange(3) for _ in beams] if random_.random() < 0.8 else []
            beams = [list(beams[source]) for source in sources] or beams
            starts = [
                random_.randint(1, len(beam)) if random_.random() < 0.2 else len(beam) for beam in beams
            ]
            new = [some_rows(random_.choice([0, 1, 1, 1, 4]), seed=random_.randrange(99)) for _ in beams]
            if not any(new):
                new[0] = some_rows(1)
            beams = [
                beam[:start] + rows if rows else beam
                for beam, start, rows in zip(beams, starts, new, strict=True)
            ]
            answer = submit_beams(engine, name, starts, new, sources, timeout=100.0)
            wanted = [
                row
                for beam, start, rows in zip(beams, starts, new, strict=True)
                if rows
                for row in (await expected(beam))[start:]
            ]
            pending.append((answer, wanted))
            if random_.random() < 0.5:
                await asyncio.sleep(random_.choice([0.0, 0.1]))
        for answer, wanted in pending:
            assert read_rows(await answer) == wanted
        assert engine.length(name) == tuple(map(len, beams))
        engine.close_session(name)

    async def scenario() -> None:
        async with running(cache_tokens=2000, max_batch_tokens=[3, 8, 64][seed % 3]) as (engine, executor):
            await asyncio.gather(
                *(search(engine, f"search {n}", random.Random(f"{seed} {n}")) for n in range(4))
            )
            assert engine.cache_tokens_used == executor.reserved_tokens == 0

    clock.run(scenario())


async def test_a_step_that_fails_after_its_reorder_ends_the_session() -> None:
    async with running() as (engine, executor):
        await opened(engine, [some_rows(2), some_rows(2, seed=1)])
        await engine.open("b", 1, 0, timeout=1.0)
        bad = submit_beams(engine, "a", [2, 2], [[[math.nan] * WIDTH], some_rows(1)], (1, 0))
        behind = submit_beams(engine, "a", [3, 3], [some_rows(1)] * 2)
        other = submit(engine, "b", 0, some_rows(3))
        for answer in (bad, behind):
            with pytest.raises(SessionLostError, match=r"after its caches had been reordered \(.*not finite"):
                await answer
        assert read_rows(await other) == await expected(some_rows(3))
        assert engine.sessions == 1 and engine.cache_tokens_used == executor.reserved_tokens == 4


async def test_a_reorder_that_fails_ends_its_session_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (engine, executor):
        await opened(engine, [some_rows(2), some_rows(2, seed=1)])
        await opened(engine, [some_rows(2), some_rows(2, seed=1)], "b")
        await engine.open("c", 1, 0, timeout=1.0)
        reorder = executor.reorder
        failures = [MemoryError()]

        async def fail_once(*args: Any) -> None:
            if failures:
                raise failures.pop()
            await reorder(*args)

        monkeypatch.setattr(executor, "reorder", fail_once)
        lost, fine = (submit_beams(engine, name, [2, 2], [some_rows(1)] * 2, (1, 0)) for name in "ab")
        plain = submit(engine, "c", 0, some_rows(1))
        with pytest.raises(SessionLostError, match="MemoryError"):
            await lost
        assert read_rows(await fine)[0] == (await expected(some_rows(2, seed=1) + some_rows(1)))[-1]
        assert read_rows(await plain) == await expected(some_rows(1))
        assert engine.sessions == 2


async def test_an_executor_that_fails_alone_loses_nothing_without_a_reorder() -> None:
    async with running() as (engine, executor):
        await opened(engine, [some_rows(2), some_rows(2, seed=1)])
        executor.failures.append(ValueError())
        with pytest.raises(RemoteFaultError):
            # The order that there is already: nothing moves.
            await submit_beams(engine, "a", [2, 2], [some_rows(1)] * 2, (0, 1))
        assert engine.length("a") == (2, 2)


def test_a_step_that_expires_before_its_reorder_leaves_the_session_as_it_was() -> None:
    async def scenario() -> None:
        async with running() as (engine, executor):
            prompts = [some_rows(2), some_rows(2, seed=1)]
            await opened(engine, prompts)
            await engine.open("b", 1, 0, timeout=1.0)
            executor.gate = asyncio.Event()
            ahead = submit(engine, "b", 0, some_rows(1))
            await asyncio.sleep(0.1)
            late = submit_beams(engine, "a", [2, 2], [some_rows(1)] * 2, (1, 1), timeout=1.0)
            # It would fit the lengths, but was meant for the caches as reordered.
            behind = submit_beams(engine, "a", [2, 2], [some_rows(1)] * 2)
            for answer in (late, behind):
                with pytest.raises(DeadlineExceededError):
                    await answer
            executor.gate.set()
            await ahead
            tail = some_rows(1, seed=5)
            result = await submit_beams(engine, "a", [2, 2], [tail, tail])
            assert read_rows(result) == [(await expected(rows + tail))[-1] for rows in prompts]

    clock.run(scenario())


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_a_step_that_ends_while_its_reordered_batch_computes_ends_the_session(end: str) -> None:
    async def scenario() -> None:
        async with running() as (engine, executor):
            await opened(engine, [some_rows(2), some_rows(2, seed=1)])
            executor.gate = asyncio.Event()
            answer = submit_beams(engine, "a", [2, 2], [some_rows(1)] * 2, (1, 0), timeout=5.0)
            while not executor.computing:
                await asyncio.sleep(0)
            if end == "cancelled":
                answer.cancel()
                await asyncio.sleep(0)
            else:
                with pytest.raises(SessionLostError, match="not computed by its deadline"):
                    await answer
            with pytest.raises(SessionLostError):
                engine.length("a")
            # The room is not given away before the executor is done with it.
            assert engine.cache_tokens_used == 8
            executor.gate.set()
            await asyncio.sleep(0.1)
            assert engine.cache_tokens_used == 0

    clock.run(scenario())


async def test_a_copy_waits_for_room_like_new_tokens() -> None:
    async with running(cache_tokens=24) as (engine, _):
        prompts, tail = [some_rows(8), some_rows(1, seed=1)], some_rows(1, seed=2)
        await opened(engine, prompts)
        await engine.open("b", 1, 0, timeout=1.0)
        await run(engine, "b", 0, some_rows(8))
        # Two sequences of 8 and one token more need 20 tokens in pages; 24 less 8 are there.
        growing = submit_beams(engine, "a", [8, 8], [tail, []], (0, 0))
        await asyncio.sleep(0)
        assert not growing.done() and engine.length("a") == (8, 1)
        engine.close_session("b")
        assert read_rows(await growing) == (await expected(prompts[0] + tail))[8:]
        assert engine.length("a") == (9, 8) and engine.cache_tokens_used == 20


async def test_a_copy_that_can_never_fit_is_refused_and_nothing_moves() -> None:
    async with running(cache_tokens=16) as (engine, _):
        prompts, tail = [some_rows(8), some_rows(1, seed=1)], some_rows(1, seed=2)
        await opened(engine, prompts)
        with pytest.raises(CacheFullError, match="has 16 in all"):
            await submit_beams(engine, "a", [8, 8], [tail, tail], (0, 0))
        result = await submit_beams(engine, "a", [7, 1], [tail, tail])
        rows = [prompts[0][:7] + tail, prompts[1] + tail]
        assert read_rows(result) == [(await expected(each))[-1] for each in rows]


def test_an_evicted_search_is_lost_as_a_whole() -> None:
    async def scenario() -> None:
        async with running(cache_tokens=24, idle_grace=1.0) as (engine, executor):
            await opened(engine, [some_rows(8), some_rows(4)])
            await asyncio.sleep(2.0)
            await engine.open("b", 1, 0, timeout=1.0)
            await run(engine, "b", 0, some_rows(20))
            with pytest.raises(SessionLostError):
                submit_beams(engine, "a", [4, 8], [some_rows(1)] * 2, (1, 0))
            assert executor.reserved_tokens == 20

    clock.run(scenario())


@pytest.mark.virtual_time
async def test_the_wait_of_decode_steps_is_known_and_fades() -> None:
    async with running() as (engine, executor):
        for name in "abc":
            await engine.open(name, 1, 0, timeout=1.0)
        executor.gate = asyncio.Event()
        first, prefill = submit(engine, "a", 0, some_rows(1)), submit(engine, "b", 0, some_rows(3))
        await asyncio.sleep(1.0)
        assert engine.queue_seconds == 0.0
        second = submit(engine, "c", 0, some_rows(1))
        await asyncio.sleep(2.0)
        executor.gate.set()
        await asyncio.gather(first, second, prefill)
        assert engine.queue_seconds == pytest.approx(0.2)
        assert engine.counters["queue_seconds"] == engine.queue_seconds
        await asyncio.sleep(30.0)
        assert engine.queue_seconds == pytest.approx(0.2 / math.e)
