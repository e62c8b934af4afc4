"""A server's way from a file in PEFT's format to what its blocks compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from applied_adapter import hidden_with_adapter
from passes_of_rows import through
from tiny_models import save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.base import TrainingBatch
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.server.loading import read_adapter
from swarmcore.training import LoraAdapter, PrefixAdapter, save_adapter
from swarmcore.types import Span


@pytest.mark.parametrize("kind", ["lora", "prefix"])
async def test_blocks_compute_with_what_is_in_the_file(kind: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    model = save_random_model(config, tmp_path / "model")
    adapter: LoraAdapter | PrefixAdapter
    if kind == "prefix":
        adapter = PrefixAdapter.for_model(config, tokens=3, seed=1)
    else:
        adapter = LoraAdapter.for_model(config, blocks=Span(1, 3), targets="all-linear", rank=2, seed=1)
        torch.manual_seed(2)
        for weight in adapter.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(tmp_path / "adapter", adapter, config)

    checkpoint = open_checkpoint(str(tmp_path / "model"))
    ids = torch.randint(3, 120, (1, 7), generator=torch.Generator().manual_seed(0))
    hidden = model.get_input_embeddings()(ids)[0].detach()
    for span in (Span(0, 2), Span(2, 5)):  # two servers
        executor = TorchExecutor.load(checkpoint, span, dtype="float32", threads=1)
        weights = read_adapter(str(tmp_path / "adapter"), checkpoint.config, span)
        ready = await executor.load_adapter(weights.tensors, weights.scaling)
        batch = TrainingBatch(span, (7,), to_wire("hidden", hidden), ready)
        hidden = to_torch((await through(executor.forward(batch), 100)).outputs).clone()
        await executor.close()
    expected = hidden_with_adapter(model, adapter, ids)[0]
    torch.testing.assert_close(model.base_model.norm(hidden).detach(), expected, rtol=1e-4, atol=1e-4)
