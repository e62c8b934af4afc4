"""What strangers send, compressed, to a process whose memory is limited: it is refused, and takes none."""

from __future__ import annotations

import asyncio
import resource
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import zstandard
from tiny_models import save_random_model, tiny_config
from torch_server import torch_server

from swarmcore.errors import AdapterError, ResourceLimitError, SwarmError
from swarmcore.identity import Identity
from swarmcore.resources import Bounds, Machine, ResourceLimits, ResourceManager
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.types import ModelInfo
from swarmcore.wire.forward_backward import AdapterName, AdapterPart, AdapterWanted, OpenForward
from swarmcore.wire.messages import OpenSession
from swarmcore.wire.protocols import FORWARD_PROTOCOL, INFERENCE_PROTOCOL
from swarmcore.wire.tensors import Tensor

MIB = 2**20
AT_ONCE = 20
LIMIT = 192 * MIB
"""Bytes that the process may take beyond what it has; one bomb is 240 MiB."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and sets RLIMIT_AS")


def bomb(name: str, *shape: int, dtype: str = "float32") -> Tensor:
    """A tensor of zeros, made without having them all at once."""
    tensor = Tensor(name, dtype, shape, memoryview(b""), "raw+zstd")
    left = tensor.decoded_nbytes
    packed, compressor = bytearray(), zstandard.ZstdCompressor(level=3).compressobj(size=left)
    while left:
        packed += compressor.compress(bytes(min(left, MIB)))
        left -= min(left, MIB)
    packed += compressor.flush()
    return Tensor(name, dtype, shape, memoryview(packed), "raw+zstd")


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """No more memory than so many bytes beyond what is in use now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attacked")
    save_random_model(tiny_config("llama"), path)
    return path


async def wanted(client: Node, node: Node, model: ModelInfo, *, forward: bool) -> Channel:
    """A channel on which the server has asked for an adapter."""
    name = AdapterName(version=secrets.token_hex(16))
    opening: Any = OpenSession(secrets.token_hex(16), model.fingerprint, 0, 5, 1, adapter=name)
    if forward:
        opening = OpenForward(model.fingerprint, 0, 5, (1,), adapter=name)
    channel = await client.open(node.addresses, FORWARD_PROTOCOL if forward else INFERENCE_PROTOCOL, opening)
    assert isinstance((await channel.receive()).record, AdapterWanted)
    return channel


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
    "tensors",
    [
        [bomb("0.self_attn.q_proj.lora_A", 983_040, 64)],
        [bomb("0.self_attn.q_proj.lora_A", 240, MIB // 4)],
        [bomb("0.prefix", 2, 983_040, 2, 16)],
        [bomb("0.no_such_module.lora_A", 64, 64)],
        [bomb("0.self_attn.q_proj.lora_B", 64, 64, dtype="int64")],
        [bomb("4000.self_attn.q_proj.lora_A", 64, 64)],
    ],
    ids=lambda tensors: f"{tensors[0].name} {tensors[0].shape} {tensors[0].dtype}",
)
async def test_adapters_that_no_block_has_room_for(
    folder: Path, tensors: list[Tensor], forward: bool
) -> None:
    async with torch_server(folder, adapter_budget=1024 * MIB) as (node, network, model):
        identity = Identity.generate()
        async with Node(identity, [network.transport(identity, listen=False)]) as client:
            channels = [await wanted(client, node, model, forward=forward) for _ in range(AT_ONCE)]
            before = status("VmRSS")
            with limited(LIMIT):
                await asyncio.gather(*(c.send(AdapterPart(last=True), *tensors) for c in channels))
                for channel in channels:
                    with pytest.raises(AdapterError, match=r"lora_|prefix|weights for block|projections"):
                        await channel.receive()
                    await channel.close()
                assert status("VmRSS") - before < 16 * MIB


async def test_adapters_of_right_shapes_are_counted_for_their_peer(folder: Path) -> None:
    modules = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
    tensors = []
    for block in range(5):
        for module, (inside, outside) in modules.items():
            rank = max(inside, outside)
            tensors.append(bomb(f"{block}.self_attn.{module}.lora_A", rank, inside))
            tensors.append(bomb(f"{block}.self_attn.{module}.lora_B", outside, rank))
    whole = sum(tensor.decoded_nbytes for tensor in tensors)
    bytes_of_peer = 3 * whole // 2
    limits = ResourceLimits.of(Machine(1024, 2**30))
    manager = ResourceManager(attrs.evolve(limits, bytes=Bounds(2**30, bytes_of_peer, 2**20, 2**30)))
    async with torch_server(folder, adapter_budget=10 * whole, resources=manager) as served:
        node, network, model = served
        identity = Identity.generate()
        async with Node(identity, [network.transport(identity, listen=False)]) as client:
            channels = [await wanted(client, node, model, forward=False) for _ in range(8)]
            peak = 0
            for first in range(0, len(tensors), 8):
                part = AdapterPart(last=first + 8 >= len(tensors))
                for channel in channels:
                    try:
                        await channel.send(part, *tensors[first : first + 8])
                    except SwarmError:  # refused by now
                        continue
                    peak = max(peak, next(use.used for use in manager.snapshot() if use.resource == "bytes"))
            answers = await asyncio.gather(*(c.receive() for c in channels), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, ResourceLimitError)]
            assert refused and len(refused) < len(channels), "some come in, the others have to wait"
            assert peak <= bytes_of_peer
            for channel in channels:
                channel.abort("enough")
