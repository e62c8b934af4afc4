"""Adapters for the counting model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from swarmcore.client.adapters import AdapterWeights
from swarmcore.testing.rows import tensor_of
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.tensors import Tensor

WIDTH = 4


def adapter_tensors(seed: int = 0, blocks: Sequence[int] = (2, 5), prefix: int = 3) -> list[Tensor]:
    """Low-rank updates and prefixes of some blocks."""
    rng = random.Random(seed)

    def weights(name: str, *shape: int) -> Tensor:
        return tensor_of(name, [rng.randrange(-256, 256) / 512 for _ in range(math.prod(shape))], shape)

    found = []
    for block in blocks:
        found.append(weights(f"{block}.self_attn.q_proj.lora_A", 2, WIDTH))
        found.append(weights(f"{block}.self_attn.q_proj.lora_B", WIDTH, 2))
        if prefix:
            found.append(weights(f"{block}.prefix", 2, prefix, 2, WIDTH // 2))
    return found


def weights_of(tensors: Sequence[Tensor], version: str, scaling: float = 2.0) -> AdapterWeights:
    """A client's own adapter."""
    by_block: dict[int, tuple[Tensor, ...]] = {}
    for tensor in tensors:
        block = int(tensor.name.partition(".")[0])
        by_block[block] = (*by_block.get(block, ()), tensor)
    return AdapterWeights(AdapterName(version=version), scaling, by_block)
