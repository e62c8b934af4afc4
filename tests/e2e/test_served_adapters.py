"""Adapters in files, served by name by server processes to everyone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config

import swarmcore
from swarmcore.errors import RemoteFaultError
from swarmcore.testing.processes import ServerProcess
from swarmcore.training import LoraAdapter, save_adapter

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


async def test_what_is_in_a_file_does_what_the_client_s_own_would(
    serve: Callable[..., Awaitable[ServerProcess]], tmp_path: Path
) -> None:
    config = tiny_config("llama")
    await asyncio.to_thread(save_random_model, config, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    mine = LoraAdapter.for_model(config, rank=4, seed=1)
    with torch.no_grad():
        for weight in mine.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    save_adapter(tmp_path / "adapter", mine, config)
    options = ("--adapter", f"poet={tmp_path / 'adapter'}", "--adapter-budget", "10M")
    first = await serve(tmp_path / "model", "0:2", *options)
    second = await serve(tmp_path / "model", "2:5", *options, "--bootstrap", first.address)
    async with first, second, swarmcore.connect(first.address) as swarm:
        model = await swarm.load_model(str(tmp_path / "model"), dtype="float32", threads=1)
        await swarm.wait_for_blocks(model.info, timeout=30)
        assert [server.adapters for server in swarm.view() if server.span] == [("poet",)] * 2
        hidden = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(3))
        plain, by_name, own = [
            await blocks.forward_async(hidden)
            for blocks in (model.blocks, model.blocks.adapted("poet"), model.blocks.adapted(mine))
        ]
        torch.testing.assert_close(by_name, own, rtol=1e-4, atol=1e-4)
        assert (by_name - plain).abs().max() > 0.01


async def test_a_folder_without_an_adapter_is_refused_before_blocks_are_loaded(
    serve: Callable[..., Awaitable[ServerProcess]], tmp_path: Path
) -> None:
    await asyncio.to_thread(save_random_model, tiny_config("llama"), tmp_path / "model")
    with pytest.raises(RemoteFaultError, match=r"adapter_config\.json"):
        await serve(tmp_path / "model", "0:2", "--adapter", f"poet={tmp_path}")
