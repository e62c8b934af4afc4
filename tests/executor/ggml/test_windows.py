"""Caches of models in which some layers attend to a window only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swarmcore.executor.base import SequenceId
from swarmcore.types import Span

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
pytest.importorskip("gguf")

from executor_rows import through
from random_gguf import LLAMA, WIDTH, write_random_gguf

POST_NORMS = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
KEYS = {"attention.sliding_window": 4, "attn_logit_softcapping": 50.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_random_gguf(tmp_path / "windows.gguf", "gemma2", each=LLAMA | POST_NORMS, keys=KEYS)


async def test_what_windows_have_left_is_there_for_rollbacks_and_prefixes(path: Path, load) -> None:
    executor = await load(path, cache_dtype="f32")
    rows = np.random.default_rng(0).standard_normal((60, WIDTH), dtype=np.float32)
    expected = await through(executor, rows, 0)
    for sequence in range(1, 40):  # more than the cache has room for at first, and again
        await through(executor, rows, sequence)
    for sequence, start in ((1, 50), (20, 3), (39, 57), (1, 7)):
        got = await through(executor, rows[start : start + 3], sequence, start=start)
        assert np.abs(got - expected[start : start + 3]).max() < 1e-3
    executor.reserve(SequenceId(100), executor.page)
    await executor.share_prefix(SequenceId(0), SequenceId(100), 30)
    for sequence in range(1, 40):
        executor.release(SequenceId(sequence))
    await through(executor, rows, 101)
    got = await through(executor, rows[30:], 100, start=30)
    assert np.abs(got - expected[30:]).max() < 1e-3


async def test_caches_travel_with_what_windows_have_left(path: Path, load) -> None:
    """Into a server with other blocks, sequence by sequence; and rolled back there, past several windows."""
    source, target = await load(path), await load(path, "1:4")
    rows = np.random.default_rng(1).standard_normal((41, WIDTH), dtype=np.float32)
    span = Span(2, 4)
    await through(source, rows[::-1], 7, span=span)  # somebody else's
    await through(source, rows[:30], 0, span=span)
    target.reserve(SequenceId(5), 64)
    for start, count in ((0, 19), (19, 11)):
        tensors = await source.export_cache(SequenceId(0), start, count)
        await target.import_cache(SequenceId(5), span, start, count, tensors)
    for start in (30, 23, 3):
        expected = await through(source, rows[start:], 0, start=start, span=span)
        assert np.array_equal(await through(target, rows[start:], 5, start=start, span=span), expected)


@pytest.mark.parametrize("blocks", ["2:4", "2:3", "3:4"])
async def test_caches_outlast_a_change_of_the_span(blocks: str, path: Path, load) -> None:
    """Also where what stays is one block, whose window slides or does not."""
    executor, span = await load(path), Span.parse(blocks)
    rows = np.random.default_rng(2).standard_normal((40, WIDTH), dtype=np.float32)
    alone = await load(path)
    for sequence in range(3):
        await through(executor, rows[sequence : 30 + sequence], sequence, span=span)
        await through(alone, rows[sequence : 30 + sequence], sequence, span=span)
    await executor.change_span(span)
    for sequence, start in ((0, 30), (1, 30), (2, 5)):
        got = await through(executor, rows[start:], sequence, start=start, span=span)
        assert np.array_equal(got, await through(alone, rows[start:], sequence, start=start, span=span))
