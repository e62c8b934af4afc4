"""Caches of models in which some layers attend to a window only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swarmcore.errors import SessionLostError
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


async def test_caches_stay_where_they_are(path: Path, load) -> None:
    executor = await load(path)
    rows = np.random.default_rng(1).standard_normal((9, WIDTH), dtype=np.float32)
    await through(executor, rows, 0, span=Span(2, 4))
    with pytest.raises(SessionLostError, match="do not travel"):
        await executor.export_cache(SequenceId(0), 0, 9)
    await executor.change_span(Span(2, 4))
    with pytest.raises(SessionLostError):
        await through(executor, rows[:1], 0, start=9)
    expected = await through(await load(path, "2:4"), rows)
    assert np.array_equal(await through(executor, rows, 1), expected)
