"""What caches take is what the engine has granted."""

from __future__ import annotations

import random

import pytest
import torch

from swarmcore.checkpoint import Checkpoint
from swarmcore.engine.engine import Engine
from swarmcore.executor.torch import cache_pages
from swarmcore.executor.torch.cache_pages import PAGE
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_wire
from swarmcore.types import Span

EXTENT = 3 * PAGE
NAMED = PAGE


class Sessions:
    """Sessions of an engine whose rows are the same wherever they have the same name."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.lengths: dict[str, list[int]] = {}
        self.opened = 0

    async def open(self) -> None:
        name = f"session {self.opened}"
        self.opened += 1
        sequences = self.random.choice((1, 1, 2, 3))
        texts = [b"".join(bytes([self.random.randrange(2)] * page).ljust(16) for page in range(1, 9))]
        got = await self.engine.open(name, sequences, 0, 5.0, caller="a", names=texts * sequences)
        self.lengths[name] = list(got)

    async def step(self) -> None:
        name = self.random.choice(list(self.lengths))
        lengths = self.lengths[name]
        sources: tuple[int, ...] = ()
        if len(lengths) > 1 and self.random.random() < 0.5:
            sources = tuple(self.random.randrange(len(lengths)) for _ in lengths)
            lengths = [lengths[source] for source in sources]
        starts = [self.random.choice((length, length, self.random.randint(0, length))) for length in lengths]
        counts = [self.random.choice((1, 7, PAGE, PAGE + 9)) for _ in starts]
        hidden = to_wire("hidden", torch.zeros(sum(counts), 64))
        await self.engine.step(name, starts, counts, hidden, timeout=5.0, sources=sources)
        self.lengths[name] = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(self.lengths[name]) > 8 * PAGE:
            self.close(name)

    def close(self, name: str) -> None:
        self.engine.close_session(name)
        del self.lengths[name]


@pytest.mark.parametrize("seed", range(3))
async def test_caches_take_no_more_than_was_granted(
    seed: int, tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_pages, "EXTENT", EXTENT)
    executor = TorchExecutor.load(tiny_llama, Span(0, 2), dtype="float32", threads=1)
    page = PAGE * executor.cache_bytes_per_token
    engine = Engine(executor, cache_tokens=200 * PAGE, named_tokens=NAMED)
    await engine.start()
    sessions = Sessions(engine, seed)
    try:
        for _ in range(60):
            if not sessions.lengths or (len(sessions.lengths) < 4 and sessions.random.random() < 0.3):
                await sessions.open()
            elif sessions.random.random() < 0.1:
                sessions.close(sessions.random.choice(list(sessions.lengths)))
            else:
                await sessions.step()
            await executor.reorder([], [])  # what was given back before is free
            granted = engine.cache_tokens_used // PAGE + engine.prefixes.pages
            assert executor.cache_bytes_held <= (granted + EXTENT // PAGE) * page
            assert executor.cache_bytes_held % page == 0
        assert engine.counters["prefix_hits"] > 0
        for name in list(sessions.lengths):
            sessions.close(name)
        await executor.reorder([], [])
        assert executor.cache_bytes_held == engine.prefixes.pages * page > 0
    finally:
        await engine.close()
        await executor.reorder([], [])
        assert executor.cache_bytes_held == 0
        await executor.close()
