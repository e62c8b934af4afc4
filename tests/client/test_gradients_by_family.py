"""Gradients of inputs, low-rank updates and deep prompts through servers, as plain PyTorch has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapter import cache_with_prefix, low_rank_updates
from byte_tokenizer import byte_tokenizer
from passes_of_rows import relative, run_blocks
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served

from swarmcore import sync
from swarmcore.testing.fleet import split_blocks
from swarmcore.training import LoraAdapter, PrefixAdapter

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("k_proj", "o_proj", "up_proj"),
    "gemma3": ("q_proj", "v_proj", "gate_proj"),
    "mixtral": ("q_proj", "o_proj"),
    "bloom": ("query_key_value", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_fc"),
    "SmolLM2": ("q_proj", "v_proj"),
}
LENGTHS = (9, 4, 6)
MASK = torch.tensor([[1] * length + [0] * (9 - length) for length in LENGTHS])
"""Padding at the right: at the left, families with positions of their own would shift."""

Adapter = LoraAdapter | PrefixAdapter | None


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapters(config: Any, targets: tuple[str, ...]) -> list[Adapter]:
    """None, low-rank updates and deep prompts, all of which have a part in the result."""
    low_rank = LoraAdapter.for_model(config, targets=targets, rank=3, alpha=6)
    prefix = PrefixAdapter.for_model(config, tokens=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter, scale in ((low_rank, 0.1), (prefix, 1.0)):
            for weight in adapter.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return [None, low_rank, prefix]


def through_here(plain: Any, hidden: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """Rows through all blocks of the plain model, each sequence by itself."""
    with ExitStack() as stack:
        if isinstance(adapter, LoraAdapter):
            stack.enter_context(low_rank_updates(plain, adapter))
        prefix = adapter if isinstance(adapter, PrefixAdapter) else None
        outputs = [
            run_blocks(plain, rows, prefix and cache_with_prefix(plain, prefix, 1))
            for rows in hidden[MASK.bool()].split(LENGTHS)
        ]
    return torch.cat(outputs)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("family", TARGETS)
def test_gradients_are_those_of_the_plain_model(
    family: str, servers: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if family == "SmolLM2":
        folder, plain = request.getfixturevalue("smollm2_folder"), request.getfixturevalue("plain_smollm2")
    else:
        folder, plain = tmp_path, save_random_model(tiny_config(family, every_expert=True), tmp_path)
        byte_tokenizer().save_pretrained(folder)
    # Its outliers, thousands of times the rest, make the kernels of one CPU differ from those of another.
    bound = 5e-3 if family == "SmolLM2" else 1e-4
    config = plain.config
    spans = map(str, split_blocks(config.num_hidden_layers, servers))
    with served(folder, *spans) as running, sync.connect(str(running[0].node.addresses[0])) as swarm:
        model = swarm.load_model(str(folder), dtype="float32")
        swarm.wait_for_blocks(model.info, timeout=30)
        generator = torch.Generator().manual_seed(2)
        hidden, above = torch.randn(2, len(LENGTHS), 9, config.hidden_size, generator=generator)
        hidden.requires_grad_()
        unchanged = through_here(plain, hidden, None)
        for adapter in adapters(config, TARGETS[family]):
            wanted = [hidden, *(adapter.parameters() if adapter is not None else ())]
            here = through_here(plain, hidden, adapter)
            there = model.blocks(hidden, MASK, adapter=adapter)
            assert adapter is None or relative(here, unchanged) > 0.01
            assert relative(there[MASK.bool()], here) < bound
            expected = torch.autograd.grad(here, wanted, above[MASK.bool()])
            found = torch.autograd.grad(there, wanted, above)
            for gradient, other in zip(found, expected, strict=True):
                assert other.abs().max() > 0
                assert relative(gradient, other) < bound
