"""What the engine refuses, it refuses at once, and nothing has changed."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from counting_engine import running, some_rows, submit

from swarmcore.errors import (
    CacheFullError,
    InputError,
    InvalidStepError,
    SessionLostError,
    SwarmError,
    TooManyCallsError,
    UnknownCodecError,
)
from swarmcore.testing.executor import hidden_states
from swarmcore.wire.tensors import Tensor


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
