"""Products with a matrix of a GGUF, of any type, are those with its values; nothing of it is kept beside."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
gguf = pytest.importorskip("gguf")

from random_gguf import WIDTH, write_random_gguf  # noqa: E402

from swarmcore.checkpoint.gguf_source import open_gguf  # noqa: E402
from swarmcore.errors import CheckpointError, MissingExtraError, UnsupportedModelError  # noqa: E402
from swarmcore.executor.ggml import matrix  # noqa: E402
from swarmcore.executor.ggml.library import library  # noqa: E402
from swarmcore.executor.ggml.matrix import GgmlMatrix  # noqa: E402

HEAD = "output.weight"
OUTPUTS = 300
KINDS = {"F32": 1e-6, "F16": 2e-3, "BF16": 0.01, "Q8_0": 0.02, "Q5_1": 0.02, "Q4_0": 0.02, "Q4_1": 0.02}
"""By how much of their size products may differ: what comes in is rounded as the type's products want it."""


def written(folder: Path, kind: str = "F32", outputs: int = OUTPUTS, **around: tuple[int, ...]) -> Path:
    shapes = {HEAD: (outputs, WIDTH), **around}
    return write_random_gguf(
        folder / "model.gguf", blocks=1, around=shapes, kind=gguf.GGMLQuantizationType[kind]
    )


def values(path: Path, name: str = HEAD) -> np.ndarray:
    [found] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name]
    return gguf.quants.dequantize(found.data, found.tensor_type)


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(WIDTH, dtype=np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_its_values(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    held = GgmlMatrix(open_gguf(str(path)), HEAD)
    assert (held.outputs, held.inputs, held.kind) == (OUTPUTS, WIDTH, kind)
    weight = values(path)
    for seed in range(3):
        found, expected = held.product(row(seed)), weight @ row(seed)
        assert found.dtype == np.float32 and found.shape == (OUTPUTS,)
        assert np.linalg.norm(found - expected) <= KINDS[kind] * np.linalg.norm(expected)


def test_what_was_given_stays_as_it_was(tmp_path: Path) -> None:
    held = GgmlMatrix(open_gguf(str(written(tmp_path))), HEAD)
    first = held.product(row(2))
    before = first.copy()
    held.product(row(3))
    assert np.array_equal(first, before)


def test_of_several_threads_each_gets_its_own(tmp_path: Path) -> None:
    held = GgmlMatrix(open_gguf(str(written(tmp_path))), HEAD)
    given = [row(seed) for seed in range(8)]
    expected = [held.product(each) for each in given]
    found: dict[int, bool] = {}

    def work(number: int) -> None:
        same = [
            np.array_equal(held.product(given[number], 1 + number % 2), expected[number]) for _ in range(50)
        ]
        found[number] = all(same)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(len(given)), True)


def test_its_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    free = matrix._free
    monkeypatch.setattr(matrix, "_free", lambda *args: (freed.append(1), free(*args)))
    held = GgmlMatrix(open_gguf(str(written(tmp_path))), HEAD)
    held.product(row(1))
    del held
    gc.collect()
    assert freed == [1]


def test_it_is_read_where_it_lies_badly(tmp_path: Path) -> None:
    """Files may say that their tensors lie at multiples of 8 bytes."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(8)
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1 if key == "block_count" else WIDTH)
    weight = np.random.default_rng(0).standard_normal((OUTPUTS, WIDTH), dtype=np.float32)
    for number in range(4):
        writer.add_tensor(f"odd.{number}", np.zeros(1 + number, np.float32))
        writer.add_tensor(f"{number}.weight", weight)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(str(path))
    places = {model.places[f"{number}.weight"].tensor.start % 64 for number in range(4)}
    assert len(places) > 1
    for number in range(4):
        found = GgmlMatrix(model, f"{number}.weight").product(row(2))
        assert np.allclose(found, weight @ row(2), atol=1e-3)


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    model = open_gguf(str(written(tmp_path)))
    for name in ("nothing.weight", "output_norm.weight"):
        with pytest.raises(CheckpointError, match=f"has no matrix {name}"):
            GgmlMatrix(model, name)


def test_types_without_products_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1 if key == "block_count" else WIDTH)
    writer.add_tensor(HEAD, np.zeros((4, WIDTH), np.int32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"output.weight of model is of I32"):
        GgmlMatrix(open_gguf(str(path)), HEAD)


def test_a_file_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    model = open_gguf(str(path))
    path.write_bytes(path.read_bytes()[: model.places[HEAD].tensor.start + 100])
    with pytest.raises(CheckpointError, match="shorter"):
        GgmlMatrix(model, HEAD)


def test_a_library_that_lacks_a_function_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_gguf(str(written(tmp_path)))
    lacking = {**matrix._FUNCTIONS, "ggml_not_there": (None, [])}
    monkeypatch.setattr(matrix, "_FUNCTIONS", lacking)
    with pytest.raises(
        MissingExtraError, match=rf"{library().version} cannot be used: it lacks ggml_not_there"
    ):
        GgmlMatrix(model, HEAD)
