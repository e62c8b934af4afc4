"""What can be shown of other devices without one: tensors are made where they are used, never by default.

The ``meta`` device stands for a GPU: hardly any operation mixes it with the CPU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tiny_models import save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.torch import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.torch.adapters import TorchAdapter
from swarmcore.executor.torch.batch import Attention, TargetModule, causal_mask
from swarmcore.executor.torch.families.alibi import AlibiBias
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.lora import Hooks, RowAdapters, StackedAdapters
from swarmcore.executor.torch.microbatch import Microbatch
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.span import load_span
from swarmcore.executor.torch.sparse_codecs import SHARES
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span

ELSEWHERE = torch.device("meta")
SPAN = Span(0, 3)
PROJECTIONS = {"llama": "self_attn.o_proj", "gemma2": "self_attn.q_proj", "gpt2": "attn.c_attn"}


def moved(family: str, folder: Path) -> LoadedBlocks:
    """Blocks that were loaded, and put on the other device."""
    save_random_model(tiny_config(family), folder)
    checkpoint = open_checkpoint(str(folder))
    model = load_span(checkpoint, SPAN, dtype=torch.float32, device=torch.device("cpu"))
    for number in SPAN:
        model.block(number).to(ELSEWHERE)
    model.layout = attrs.evolve(model.layout, device=ELSEWHERE)
    return LoadedBlocks([model])


def adapter_for(loaded: LoadedBlocks, module: str) -> TorchAdapter:
    """A low-rank update in block 1, and prefixes."""
    target = TargetModule(1, module)
    projection: Any = loaded.block(1).get_submodule(module)
    inside, outside = projection.weight.shape if module == "attn.c_attn" else projection.weight.shape[::-1]
    weights = {
        target.lora_a: torch.zeros(2, inside, device=ELSEWHERE),
        target.lora_b: torch.zeros(outside, 2, device=ELSEWHERE),
    }
    for block, layer in enumerate(loaded.layout(SPAN).layers):
        weights[f"{block}.prefix"] = torch.zeros(2, 3, layer.heads, layer.key_size, device=ELSEWHERE)
    return TorchAdapter(weights, [target], 0.5)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_steps_and_passes_stay_on_the_device_of_the_blocks(family: str, tmp_path: Path) -> None:
    loaded = moved(family, tmp_path)
    adapter = adapter_for(loaded, PROJECTIONS[family])
    Hooks().install(adapter, loaded)
    with torch.inference_mode():
        caches = [SequenceCache(loaded.layout(SPAN)) for _ in range(3)]
        for counts in ((5, 70, 1), (1, 1, 1), (3, 1, 9)):
            pieces = [(cache, cache.length, count) for cache, count in zip(caches, counts, strict=True)]
            rows = [(None, counts[0]), (adapter, sum(counts[1:]))]
            updates = RowAdapters(rows, StackedAdapters([adapter], torch.float32))
            batch = RaggedBatch(pieces, ELSEWHERE, updates=updates)
            output = loaded.forward(torch.zeros(1, batch.tokens, 64, device=ELSEWHERE), batch, SPAN)
            assert output.device == ELSEWHERE
    for chosen in (None, adapter):
        microbatch = Microbatch(
            0, (7, 7, 20), torch.zeros(34, 64, device=ELSEWHERE), SPAN, chosen, graph=True
        )
        microbatch.forward(loaded, 3)
        microbatch.gradient = torch.zeros(34, 64, device=ELSEWHERE)
        weights = {} if chosen is None else chosen.weights
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        assert microbatch.backward(3, 0, sums, inputs=True)
        assert microbatch.gradient.device == ELSEWHERE


@pytest.mark.parametrize("tokens", [1, 5])
def test_masks_have_the_dtype_of_the_queries_where_kernels_take_no_other(tokens: int) -> None:
    for device, expected in ((torch.device("cpu"), torch.float32), (ELSEWHERE, torch.bfloat16)):
        bias = AlibiBias(partial(torch.zeros, 4, device=device))
        mask = causal_mask(3, 3 + tokens, Attention(1.0, bias=bias), device, torch.bfloat16)
        assert mask is not None and (mask.dtype, mask.device) == (expected, device)


@pytest.mark.parametrize("codec", ["raw", "int8", "mixed3", *(f"topk{share}" for share in SHARES[::4])])
def test_a_default_device_is_no_business_of_codecs(codec: str) -> None:
    for values in (torch.randn(20, 100, generator=torch.Generator().manual_seed(1)), torch.empty(0, 64)):
        expected = to_wire("hidden", values, codec)
        with torch.device(ELSEWHERE):
            wire = to_wire("hidden", values, codec)
            decoded = to_torch(wire)
        assert bytes(wire.data) == bytes(expected.data)
        assert torch.equal(decoded, to_torch(expected))
