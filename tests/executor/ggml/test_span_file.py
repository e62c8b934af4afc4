"""The GGUF of a span: every byte as it was, written once for all processes, removed when nobody uses it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from random_gguf import write_random_gguf

from swarmcore.checkpoint.gguf_model import open_local
from swarmcore.errors import SpanError, StorageError
from swarmcore.executor.ggml.span_file import span_file
from swarmcore.types import Span


def test_the_span_has_the_bytes_of_its_blocks(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    seen: list[int] = []
    with span_file(
        open_local(source),
        Span(1, 3),
        cache=tmp_path,
        progress=lambda what, done, total: seen.append(total - done),
    ) as span:
        made = GGUFReader(span.path)
    assert seen[-1] == 0
    there = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    here = {tensor.name: tensor for tensor in made.tensors}
    blocks = {name for name in here if name.startswith("blk.")}
    assert blocks == {name for name in there if name.startswith(("blk.0.", "blk.1."))}
    for name in blocks:
        original = there[name.replace("blk.1.", "blk.2.").replace("blk.0.", "blk.1.")]
        assert here[name].tensor_type == original.tensor_type
        assert np.array_equal(here[name].data, original.data), name
    assert here["token_embd.weight"].data.nbytes < 32 * 64 * 4 + 1
    assert not here["token_embd.weight"].data.any()
    assert (here["output_norm.weight"].data == 1).all()
    assert made.fields["llama.block_count"].contents() == 2
    assert made.fields["tokenizer.ggml.model"].contents() == "none"


def test_it_is_written_once(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    with span_file(model, Span(0, 2), cache=tmp_path) as first:
        made = first.path.stat().st_ino
    with span_file(model, Span(0, 2), cache=tmp_path) as again:
        assert (again.path, again.path.stat().st_ino) == (first.path, made)
    os.truncate(first.path, 1000)  # as if a disk had lost a part of it
    with span_file(model, Span(0, 2), cache=tmp_path) as mended:
        assert mended.nbytes == first.nbytes


def test_unused_spans_go_and_used_ones_stay(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    used = span_file(model, Span(0, 1), cache=tmp_path)
    for start in (1, 2, 3):
        span_file(model, Span(start, start + 1), cache=tmp_path).close()
    left = sorted(path.name.split("-")[2] for path in (tmp_path / "spans").iterdir())
    assert left == ["0", "2", "3"]
    used.close()


def test_room_is_looked_for_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    span_file(model, Span(0, 1), cache=tmp_path).close()
    for module in ("swarmcore.checkpoint.storage", "swarmcore.executor.ggml.span_file"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda path: 5000)
    with pytest.raises(StorageError, match=r"disk is full: writing blocks .* 5 kB is free") as caught:
        span_file(model, Span(1, 2), cache=tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.needed > caught.value.free == 5000
    assert list((tmp_path / "spans").iterdir()) == []  # the unused one gave way first


def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(SpanError, match="0:4"):
        span_file(model, Span(3, 5), cache=tmp_path)
