"""From settings to blocks: which back end opens a model, and what memory is left beside the weights."""

from __future__ import annotations

from typing import Any

import pytest

from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.loader import BlockLoader, LoadSettings
from swarmcore.placement.capacity import BlockNeeds, CapacityPlan
from swarmcore.server import loading
from swarmcore.server.config import ServerConfig
from swarmcore.server.loading import default_cache_tokens, memory_left, open_model, plan_blocks
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.types import Progress, Span

MIB = 2**20


class Loader(BlockLoader):
    """Blocks of 10 MiB, on a machine with 100 MiB."""

    model = COUNTING_MODEL
    free = 100 * MIB

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        self.settings = settings

    def needs(self) -> BlockNeeds:
        return BlockNeeds(weights=10 * MIB, cache_per_token=32)

    def free_memory(self) -> int:
        return self.free

    def load(self, span: Span, *, progress: Progress | None = None) -> CountingExecutor:
        return CountingExecutor(span)


class Unfit(Loader):
    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        raise UnsupportedModelError("llama.cpp does not know it")


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[BlockLoader]]:
    """What is opened by the names of the back ends; ggml is chosen."""
    found: dict[str, type[BlockLoader]] = {"ggml": Loader, "torch": Loader}
    opener = loading.open_loader

    def open_loader(
        executor: Any, settings: LoadSettings, *, progress: Progress | None = None
    ) -> BlockLoader:
        return opener(found[executor], settings, progress=progress)

    monkeypatch.setattr(loading, "open_loader", open_loader)
    monkeypatch.setattr(loading, "import_large", lambda *modules, progress: None)
    monkeypatch.setattr(loading, "choose_executor", lambda model, **options: "ggml")
    return found


def test_auto_falls_back_to_torch_and_a_choice_does_not(
    loaders: dict[str, type[BlockLoader]], caplog: pytest.LogCaptureFixture
) -> None:
    loaders["ggml"] = Unfit
    assert type(open_model(ServerConfig(model="m.gguf"), None)) is Loader
    assert "torch is taken instead: llama.cpp does not know it" in caplog.text
    with pytest.raises(UnsupportedModelError, match="does not know it"):
        open_model(ServerConfig(model="m.gguf", executor="ggml"), None)
    loaders["torch"] = Unfit
    with pytest.raises(UnsupportedModelError):
        open_model(ServerConfig(model="m.gguf"), None)


def test_memory_bounds_blocks_caches_and_activations(loaders: dict[str, type[BlockLoader]]) -> None:
    config = ServerConfig(model="m.gguf", memory=50 * MIB, cache_tokens=None)
    loader = open_model(config, None)
    plan = plan_blocks(config, loader)
    assert plan.blocks == 4
    executor = loader.load(Span(0, 4))
    # Weights of a mapped file leave the memory as free as before.
    left = memory_left(plan, executor, loader)
    assert left == 10 * MIB
    assert default_cache_tokens(executor, left) == left // executor.cache_bytes_per_token // 4
    Loader.free = 4 * MIB
    try:
        assert memory_left(plan, executor, loader) == 4 * MIB
    finally:
        Loader.free = 100 * MIB


def test_more_blocks_than_seemed_to_fit_have_what_is_free() -> None:
    loader = Loader(LoadSettings(model="m"))
    plan = CapacityPlan(12, (), usable=90 * MIB, weights=10 * MIB)
    assert memory_left(plan, CountingExecutor(), loader) == 100 * MIB
