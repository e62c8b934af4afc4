"""What comes of spans is what llama.cpp computes in the whole model, to the last bit."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from swarmcore.types import Span

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
gguf = pytest.importorskip("gguf")

from executor_rows import through  # noqa: E402
from llama_rows import rows_of  # noqa: E402
from random_gguf import WIDTH, write_random_gguf  # noqa: E402

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_1"]
REPLAYS_EXACTLY = {"Q8_0", "Q4_1"}
"""Types whose products do not depend on how many rows there are, on x86-64; those of floats do."""


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_random_gguf(
        tmp_path / f"{request.param}.gguf", kind=gguf.GGMLQuantizationType[request.param]
    )


async def test_halves_and_parts_give_what_the_whole_model_does(path: Path, load) -> None:
    rows = np.random.default_rng(1).standard_normal((80, WIDTH), dtype=np.float32)
    expected = rows_of(path, 3, rows)
    first, second, whole = await load(path, "0:2"), await load(path, "2:4"), await load(path)
    assert np.array_equal(await through(second, await through(first, rows)), expected)
    assert np.array_equal(await through(whole, rows), expected)
    # From 64 rows on the last bits also depend on where in the cache a sequence is, among others.
    rows, expected = rows[:24], rows_of(path, 3, rows[:24])
    for number, (cut, end) in enumerate([(1, 3), (2, 3), (1, 2), (1, 3)], 1):
        between = await through(whole, rows, 10 * number, span=Span(0, cut))
        between = await through(whole, between, 10 * number + 1, span=Span(cut, end))
        assert np.array_equal(await through(whole, between, 10 * number + 2, span=Span(end, 4)), expected)


async def test_single_tokens_after_a_prompt_give_what_the_whole_model_does(path: Path, load) -> None:
    rows = np.random.default_rng(2).standard_normal((9, WIDTH), dtype=np.float32)
    expected = rows_of(path, 3, rows, chunk=1)
    first, second = await load(path, "0:3"), await load(path, "3:4")
    got = [await through(second, await through(first, rows[n : n + 1], start=n), start=n) for n in range(9)]
    assert np.array_equal(np.concatenate(got), expected)


async def test_which_types_replay_exactly(path: Path, load) -> None:
    rows = np.random.default_rng(3).standard_normal((16, WIDTH), dtype=np.float32)
    executor = await load(path)
    at_once = await through(executor, rows)
    one_by_one = np.concatenate([await through(executor, rows[n : n + 1], 1, start=n) for n in range(16)])
    difference = np.abs(at_once - one_by_one).max()
    exact = path.stem in REPLAYS_EXACTLY and platform.machine() in ("x86_64", "AMD64")
    assert difference == 0 if exact else difference < 0.01
