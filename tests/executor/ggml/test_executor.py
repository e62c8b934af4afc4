"""What the contract does not ask: how caches grow and are mended, what is refused, what is not imported."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from swarmcore.errors import (
    CacheFullError,
    CheckpointError,
    InputError,
    InternalError,
    InvalidStepError,
    ServerMemoryError,
    SwarmError,
)
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.loader import LoadSettings
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
gguf = pytest.importorskip("gguf")

from random_gguf import WIDTH, write_random_gguf  # noqa: E402

from swarmcore.executor.ggml import trial  # noqa: E402
from swarmcore.executor.ggml.arrays import to_rows, to_tensor  # noqa: E402
from swarmcore.executor.ggml.library import MAX_SEQUENCES  # noqa: E402
from swarmcore.executor.ggml.loader import GgmlLoader  # noqa: E402
from swarmcore.executor.ggml.span_model import CELLS  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_random_gguf(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0)


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH), dtype=np.float32)


def chunk(executor: BlockExecutor, sequence: int, rows: np.ndarray, start: int = 0) -> ScheduledChunk:
    executor.reserve(SequenceId(sequence), -(-(start + len(rows)) // executor.page) * executor.page)
    segments = (Segment(SequenceId(sequence), start, len(rows)),)
    return ScheduledChunk(to_tensor("hidden", rows, "float32"), 0, executor.span, segments)


async def run(executor: BlockExecutor, *chunks: ScheduledChunk) -> list[np.ndarray]:
    results = await executor.step(chunks)
    for result in results:
        if isinstance(result, SwarmError):
            raise result
    return [to_rows(result) for result in results if isinstance(result, Tensor)]


def cells(executor: BlockExecutor) -> int:
    return executor._loaded.model.cells


async def test_the_cache_grows_and_shrinks_with_what_is_in_it(path: Path, load) -> None:
    executor = await load(path)
    assert cells(executor) == CELLS
    before = random_rows(30)
    [expected] = await run(executor, chunk(executor, 0, before))
    [alone] = await run(executor, chunk(executor, 0, random_rows(1, 1), 30))
    for sequence in (1, 2, 3):  # in steps that are larger than a pass
        await run(executor, chunk(executor, sequence, random_rows(700, sequence)))
    assert cells(executor) >= 3 * 700
    [after] = await run(executor, chunk(executor, 0, random_rows(1, 1), 30))
    assert np.array_equal(after, alone)
    for sequence in (1, 2, 3):
        executor.release(SequenceId(sequence))
    [again] = await run(executor, chunk(executor, 4, before))
    assert np.array_equal(again, expected)
    assert cells(executor) == CELLS


async def test_more_sequences_than_llama_cpp_takes(path: Path, load) -> None:
    executor = await load(path, "0:1")
    row = random_rows(1)
    many = MAX_SEQUENCES + 3
    results = await executor.step([chunk(executor, sequence, row) for sequence in range(many)])
    refused = [number for number, result in enumerate(results) if isinstance(result, CacheFullError)]
    assert refused == list(range(MAX_SEQUENCES - 1, many))
    executor.release(SequenceId(0))
    [got] = await run(executor, chunk(executor, many - 1, row))
    assert isinstance(results[0], Tensor) and np.array_equal(got, to_rows(results[0]))


async def test_values_that_overflow_within_a_block_hurt_nobody_else(tmp_path: Path, load) -> None:
    path = write_random_gguf(tmp_path / "overflows.gguf")
    reader = gguf.GGUFReader(path, "r+")
    [values] = [tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_v.weight"]
    values.data[0] = 0
    values.data[0, 0] = 1e6  # more than float16 has, where the first value of a row is not 0
    reader.data.flush()
    executor = await load(path, "1:3")
    sound = random_rows(40)
    sound[:, 0] = 0
    first, then = sound[:39], sound[39:]
    [expected] = await run(executor, chunk(executor, 0, first))
    [expected_then] = await run(executor, chunk(executor, 0, then, 39))
    await run(executor, chunk(executor, 1, first), chunk(executor, 2, sound[:5]))
    chunks = [
        chunk(executor, 1, then, 39),
        chunk(executor, 2, random_rows(4, 1), 5),
        chunk(executor, 3, first),
    ]
    one, two, three = await executor.step(chunks)
    assert isinstance(two, InvalidStepError) and "not finite" in two.message
    assert isinstance(one, Tensor) and np.array_equal(to_rows(one), expected_then)
    assert isinstance(three, Tensor) and np.array_equal(to_rows(three), expected)
    # The one that overflowed can be repeated, and nothing of it is left in the cache.
    [mended] = await run(executor, chunk(executor, 2, sound[5:39], 5))
    assert np.abs(mended - expected[5:]).max() < 1e-2
    [again] = await run(executor, chunk(executor, 4, first))
    assert np.array_equal(again, expected)


async def test_sequences_of_a_dropped_span_are_gone_and_others_begin(path: Path, load) -> None:
    executor = await load(path, "0:2")
    await run(executor, chunk(executor, 0, random_rows(3)))
    executor.release(SequenceId(0))
    await executor.change_span(Span(2, 4))
    other = await load(path, "2:4")
    rows = random_rows(3)
    assert np.array_equal(
        (await run(executor, chunk(executor, 1, rows)))[0], (await run(other, chunk(other, 0, rows)))[0]
    )


async def test_a_result_may_be_rounded(path: Path, load) -> None:
    exact, rounded = await load(path), await load(path, dtype="bfloat16")
    assert (rounded.dtype, str(rounded.numerics)) == ("bfloat16", "ggml/q8_0/bf16/f16")
    rows = random_rows(5)
    [expected], [got] = await run(exact, chunk(exact, 0, rows)), await run(rounded, chunk(rounded, 0, rows))
    assert np.abs(got - expected).max() <= np.abs(expected).max() / 256
    assert not (got.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"device": "CUDA7"}, "it has cpu"), ({"dtype": "int3"}, "float32, float16, bfloat16")],
)
def test_what_is_not_there_is_refused_and_what_is_there_named(path: Path, settings, says: str) -> None:
    with pytest.raises(InputError, match=says):
        GgmlLoader(LoadSettings(model=str(path), **settings))


async def test_results_beyond_the_range_of_a_dtype_are_errors(path: Path, load) -> None:
    executor = await load(path, dtype="float16")
    large = chunk(executor, 1, 1e6 * random_rows(1))
    sound, error = await executor.step([chunk(executor, 0, random_rows(1)), large])
    assert isinstance(sound, Tensor) and sound.dtype == "float16"
    assert isinstance(error, InvalidStepError) and "not finite in float16" in error.message


async def test_once_learnt_a_graph_is_counted_and_not_read(path: Path, load, monkeypatch) -> None:
    executor = await load(path)
    tap, names = executor._loaded.model._tap, []
    read = tap._name
    monkeypatch.setattr(tap, "_name", lambda tensor: names.append(tensor) or read(tensor))
    for start in range(5):
        names.clear()
        await run(executor, chunk(executor, 0, random_rows(1), start))
    assert len(names) == 1
    part = Span(2, 4)
    for start in range(3):
        names.clear()
        step = chunk(executor, 1, random_rows(1), start)
        step.span = part
        await run(executor, step)
    assert len(names) == 2
    layout = tap._layouts[False, True, 2, 4]
    # What comes before block 2 is not computed: half of all nodes.
    assert len(layout.idle) > layout.leave / 3


async def test_sequences_that_roll_back_share_a_pass(path: Path, load, monkeypatch) -> None:
    executor = await load(path)
    await run(executor, *(chunk(executor, sequence, random_rows(6, sequence)) for sequence in range(4)))
    model, sizes = executor._loaded.model, []
    passes = model.run
    monkeypatch.setattr(model, "run", lambda *given: sizes.append(len(given[2])) or passes(*given))
    # Drafts of which some were wrong: all but one begin below their ends; one has two chunks.
    starts = (4, 2, 6, 5)
    chunks = [chunk(executor, n, random_rows(2, 10 + n), start) for n, start in enumerate(starts)]
    await run(executor, *chunks, chunk(executor, 2, random_rows(1, 20), 8))
    assert sizes == [9]
    await run(executor, chunk(executor, 0, random_rows(3), 6), chunk(executor, 0, random_rows(1), 7))
    assert sizes == [9, 3, 1]


async def test_weights_may_be_arranged_anew(tmp_path: Path, load) -> None:
    path = write_random_gguf(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q4_0)
    mapped, repacked = await load(path), await load(path, weights="repacked")
    assert [mapped.numerics.weights, repacked.numerics.weights] == ["q4_0", "q4_0+repacked"]
    rows = random_rows(5)
    [expected] = await run(mapped, chunk(mapped, 0, rows))
    [got] = await run(repacked, chunk(repacked, 0, rows))
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


async def test_caches_in_eight_bits(tmp_path: Path, load) -> None:
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1}
    path = write_random_gguf(tmp_path / "heads.gguf", keys=heads)
    exact, small, other = (
        await load(path),
        await load(path, cache_dtype="int8"),
        await load(path, cache_dtype="int8"),
    )
    assert small.numerics.cache_dtype == "int8"
    assert small.cache_bytes_per_token * 32 == exact.cache_bytes_per_token * 17
    rows = random_rows(20)
    [expected], [got] = await run(exact, chunk(exact, 0, rows)), await run(small, chunk(small, 0, rows))
    assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    tensors = await small.export_cache(SequenceId(0), 0, 20)
    assert sum(tensor.data.nbytes for tensor in tensors) == 20 * small.cache_bytes_per_token
    other.reserve(SequenceId(5), other.page)
    with pytest.raises(InvalidStepError, match="not finite"):
        scales = np.full(tensors[0].data.nbytes, 0xFF, np.uint8).data
        bad = Tensor(tensors[0].name, "uint8", tensors[0].shape, scales)
        await other.import_cache(SequenceId(5), other.span, 0, 20, (bad, tensors[1]))
    await other.import_cache(SequenceId(5), other.span, 0, 20, tensors)
    then = random_rows(1, 1)
    [here], [there] = await run(small, chunk(small, 0, then, 20)), await run(other, chunk(other, 5, then, 20))
    assert np.array_equal(here, there)


async def test_caches_that_the_model_cannot_have(path: Path, load) -> None:
    with pytest.raises(InputError, match=r"no cache of 1024 tokens in int8: .*32"):  # heads of 16 values
        await load(path, cache_dtype="int8")


@pytest.mark.parametrize("where", ["beforehand", "in llama.cpp"])
async def test_no_memory_for_a_larger_cache(path: Path, load, monkeypatch, where: str) -> None:
    executor = await load(path)
    model = executor._loaded.model
    await run(executor, chunk(executor, 0, random_rows(900)))
    [then] = await run(executor, chunk(executor, 0, random_rows(1, 1), 900))
    if where == "beforehand":
        monkeypatch.setattr("swarmcore.resources.limits.free_memory", lambda: 1000)
    else:
        made = model._make_context

        def make(cells: int) -> None:
            if cells > CELLS:
                raise ServerMemoryError("no room")
            made(cells)

        monkeypatch.setattr(model, "_make_context", make)
    with pytest.raises(ServerMemoryError):
        await executor.step([chunk(executor, 1, random_rows(500))])
    assert cells(executor) == CELLS
    [again] = await run(executor, chunk(executor, 0, random_rows(1, 1), 900))
    assert np.array_equal(again, then)
    await run(executor, chunk(executor, 1, random_rows(50)))


async def test_closing_gives_up_what_is_being_loaded(path: Path, load, monkeypatch) -> None:
    executor = await load(path, "0:1")
    reached, go_on = threading.Event(), threading.Event()

    def writing(model, span, *, progress):
        reached.set()
        assert go_on.wait(10)
        progress("writing", 1, 2)
        raise AssertionError("it goes on")

    monkeypatch.setattr("swarmcore.executor.ggml.executor.span_file", writing)
    changing = asyncio.ensure_future(executor.change_span(Span(0, 2)))
    await asyncio.to_thread(reached.wait, 10)
    closing = asyncio.ensure_future(executor.close())
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(InternalError, match="given up"):
        await changing
    await closing


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention.layer_norm_rms_epsilon": -1.0}, "eps >= 0"),
        ({"expert_count": 100000}, "MAX_EXPERTS"),
        ({"rope.scaling.type": "nonsense"}, "rope_scaling_type"),
    ],
)
async def test_what_llama_cpp_aborts_on_is_an_error(tmp_path: Path, load, keys, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"llama\.cpp cannot load .*{said}"):
        await load(write_random_gguf(tmp_path / "lies.gguf", keys=keys))


async def test_what_was_tried_is_not_tried_again(path: Path, load, monkeypatch) -> None:
    executor = await load(path, "1:2")
    monkeypatch.setattr(trial.subprocess, "Popen", None)
    await executor.change_span(Span(2, 3))
    await load(path, "0:1")


async def test_a_load_that_does_not_end_is_given_up(path: Path, load, monkeypatch) -> None:
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="has not loaded it in 0 s"):
        await load(path)


@pytest.mark.parametrize("value", ["many", ["x", "y"], [2, -1]])
async def test_numbers_of_heads_that_are_none(tmp_path: Path, value: object) -> None:
    path = write_random_gguf(tmp_path / "lies.gguf", keys={"attention.head_count_kv": value})
    with pytest.raises(CheckpointError, match="head_count_kv is"):
        GgmlLoader(LoadSettings(model=str(path), threads=1)).needs()
