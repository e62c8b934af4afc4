"""Sequences that go on, roll back, share, swap, travel and end at random give what they give alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
pytest.importorskip("gguf")

from executor_rows import through
from random_gguf import WIDTH, write_random_gguf

from swarmcore.executor.ggml.arrays import to_rows, to_tensor

ROWS = np.random.default_rng(0).standard_normal((64, WIDTH), dtype=np.float32)
PARTS = Span(0, 4), Span(0, 3), Span(1, 4), Span(1, 3)


class Model:
    """What each sequence should hold: which rows went into it, and through which blocks."""

    def __init__(self, executor: BlockExecutor, other: BlockExecutor, seed: int) -> None:
        self.executor, self.other, self.random = executor, other, random.Random(seed)
        self.sequences: dict[int, tuple[Span, list[int]]] = {}
        self.started = 0

    def reserve(self, sequence: int, tokens: int) -> None:
        page = self.executor.page
        self.executor.reserve(SequenceId(sequence), max(1, -(-tokens // page)) * page)

    def begin(self) -> int:
        self.started += 1
        return self.started

    async def step(self) -> None:
        span = self.random.choice(PARTS)
        found = [n for n, (blocks, _) in self.sequences.items() if blocks == span]
        chosen = self.random.sample(found, min(len(found), self.random.randint(0, 3)))
        chunks, expected = [], []
        for sequence in [*chosen, self.begin()]:
            held = self.sequences.get(sequence, (span, []))[1]
            start = self.random.choice([len(held), len(held), self.random.randint(0, len(held))])
            rows = [self.random.randrange(len(ROWS)) for _ in range(self.random.choice([1, 1, 3, 40]))]
            self.sequences[sequence] = span, held[:start] + rows
            self.reserve(sequence, start + len(rows))
            segments = (Segment(SequenceId(sequence), start, len(rows)),)
            reply = self.random.choice(["all", "last"])
            chunks.append(
                ScheduledChunk(to_tensor("hidden", ROWS[rows], "float32"), 0, span, segments, reply)
            )
            expected.append((sequence, len(rows) if reply == "all" else 1))
        for result, (sequence, rows) in zip(await self.executor.step(chunks), expected, strict=True):
            assert isinstance(result, Tensor), result
            await self.check(sequence, to_rows(result), rows)

    async def check(self, sequence: int, got: np.ndarray, rows: int) -> None:
        span, held = self.sequences[sequence]
        alone = await through(self.other, ROWS[held], 10_000 + self.begin(), span=span)
        self.other.release(SequenceId(10_000 + self.started))
        assert np.abs(got - alone[-rows:]).max() < 1e-3

    async def end(self) -> None:
        for sequence in self.random.sample(sorted(self.sequences), len(self.sequences) // 3):
            del self.sequences[sequence]
            self.executor.release(SequenceId(sequence))

    async def reorder(self) -> None:
        chosen = self.random.sample(sorted(self.sequences), min(4, len(self.sequences)))
        sources = [self.random.randrange(len(chosen)) for _ in chosen]
        before = [self.sequences[sequence] for sequence in chosen]
        for sequence, source in zip(chosen, sources, strict=True):
            self.reserve(sequence, max(len(before[source][1]), len(self.sequences[sequence][1])))
        await self.executor.reorder([SequenceId(sequence) for sequence in chosen], sources)
        for sequence, source in zip(chosen, sources, strict=True):
            self.sequences[sequence] = before[source]

    async def share(self) -> None:
        source = self.random.choice(sorted(self.sequences))
        span, held = self.sequences[source]
        target, tokens = self.begin(), self.random.randint(1, len(held))
        self.reserve(target, tokens)
        await self.executor.share_prefix(SequenceId(source), SequenceId(target), tokens)
        self.sequences[target] = span, held[:tokens]

    async def travel(self) -> None:
        source = self.random.choice(sorted(self.sequences))
        span, held = self.sequences[source]
        target, cut = self.begin(), self.random.randint(1, len(held))
        self.reserve(target, len(held))
        for start, end in ((0, cut), (cut, len(held))):
            if start < end:
                tensors = await self.executor.export_cache(SequenceId(source), start, end - start)
                await self.executor.import_cache(SequenceId(target), span, start, end - start, tensors)
        self.sequences[target] = span, list(held)

    async def change(self) -> None:
        for sequence in [n for n, (span, _) in self.sequences.items() if span != Span(1, 3)]:
            del self.sequences[sequence]
            self.executor.release(SequenceId(sequence))
        await self.executor.change_span(Span(1, 3))
        await self.executor.change_span(Span(0, 4))


@pytest.mark.parametrize("seed", [1])
async def test_at_random(tmp_path: Path, load, seed: int) -> None:
    path = write_random_gguf(tmp_path / "tiny.gguf")
    model = Model(await load(path, cache_dtype="f32"), await load(path, cache_dtype="f32"), seed)
    for turn in range(60):
        doing = [model.step, model.step, model.step, model.end, model.reorder, model.share, model.travel]
        do = model.change if turn == 40 else model.random.choice(doing if model.sequences else [model.step])
        await do()
