"""swarmcore's contract for executors, on this plugin as it is installed; torch's blocks beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from swarmcore_numpy import NumpyExecutor, NumpyLoader

import swarmcore
from swarmcore.errors import InputError, UnsupportedModelError
from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.loader import LoadSettings, loader_class
from swarmcore.executor.torch.loader import TorchLoader
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.serving import run_server
from swarmcore.testing.executor_contract import ExecutorContract
from swarmcore.testing.executor_contract.harness import Driver
from swarmcore.types import Span


def save(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


class TestNumpyExecutor(ExecutorContract):
    large_step = 256

    @pytest.fixture(autouse=True)
    def _use(self, folder: Path) -> None:
        self.folder = folder

    async def make(self) -> BlockExecutor:
        return NumpyLoader(LoadSettings(model=str(self.folder))).load(Span(1, 4))


async def test_it_computes_what_torch_does(folder: Path) -> None:
    settings = LoadSettings(model=str(folder), dtype="float32", threads=1)
    rows = [[(7 * i + 3 * j) % 11 / 11 - 0.5 for j in range(64)] for i in range(9)]
    outputs = []
    for loader in (NumpyLoader, TorchLoader):
        executor = loader(settings).load(Span(0, 4))
        driver = Driver(executor)
        outputs.append(await driver.one(0, rows[:6]) + await driver.one(0, rows[6:]))
        await executor.close()
    torch.testing.assert_close(torch.tensor(outputs[0]), torch.tensor(outputs[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_what_it_does_not_compute_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        NumpyLoader(LoadSettings(model=str(save(tmp_path, **options))))


async def test_servers_choose_it_by_name(folder: Path) -> None:
    assert loader_class("numpy") is NumpyLoader
    with pytest.raises(InputError, match="float32"):
        NumpyLoader(LoadSettings(model=str(folder), dtype="float16"))
    online: asyncio.Future[BlockServer] = asyncio.get_running_loop().create_future()
    config = ServerConfig(model=str(folder), executor="numpy", cache_tokens=1024, throughput=100.0)
    network = NetworkConfig(transports={"tcp": ["127.0.0.1:0"]})
    serving = asyncio.create_task(
        run_server(config, network, Identity.generate(), on_online=online.set_result)
    )
    try:
        await asyncio.wait([serving, online], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        server = online.result()
        assert isinstance(server.executor, NumpyExecutor)
        async with swarmcore.connect(*server.info.addresses) as swarm:
            session = await swarm.open_session(server.executor.model)
            async with session:
                assert session.chain.stages
    finally:
        serving.cancel()
        await asyncio.wait([serving])
