"""Executors of small random models, by llama.cpp."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.loader import LoadSettings
from swarmcore.types import Span

Load = Callable[..., Awaitable[BlockExecutor]]


@pytest_asyncio.fixture
async def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Load]:
    """``await load(path, "1:3")`` gives an executor, which is closed at the end."""
    pytest.importorskip("llama_cpp", reason="needs the extra ggml")
    from swarmcore.executor.ggml.loader import GgmlLoader

    monkeypatch.setenv("SWARMCORE_CACHE", str(tmp_path / "cache"))
    async with AsyncExitStack() as stack:

        async def load_span(path: Path, span: str = "0:4", **settings: object) -> BlockExecutor:
            loader = GgmlLoader(LoadSettings(model=str(path), threads=1, **settings))
            executor = loader.load(Span.parse(span))
            stack.push_async_callback(executor.close)
            return executor

        yield load_span
