"""Gradients of inputs, low-rank updates and deep prompts through servers, as plain PyTorch has them."""

from __future__ import annotations

import copy
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from applied_adapter import cache_with_prefix, low_rank_updates
from byte_tokenizer import byte_tokenizer
from exact_results import FACTOR, InFloat64, error, in_float64, nudged
from passes_of_rows import run_blocks
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served

from swarmcore import sync
from swarmcore.training import LoraAdapter, PrefixAdapter
from swarmcore.types import Span

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("k_proj", "o_proj", "up_proj"),
    "gemma3": ("q_proj", "v_proj", "gate_proj"),
    "mixtral": ("q_proj", "o_proj"),
    "bloom": ("query_key_value", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_fc"),
    "SmolLM2": ("q_proj", "v_proj"),
}
REAL_BLOCKS = 9
"""Of the 30 that SmolLM2 has: with real weights, too, an error in one block shows in three."""

LENGTHS = (9, 4, 6)
MASK = torch.tensor([[1] * length + [0] * (9 - length) for length in LENGTHS])
"""Padding at the right: at the left, families with positions of their own would shift."""

Adapter = LoraAdapter | PrefixAdapter | None


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


Results = tuple[torch.Tensor, list[torch.Tensor]]
"""Outputs, and gradients of inputs and of an adapter's weights."""


def results(outputs: torch.Tensor, hidden: torch.Tensor, adapter: Adapter, above: torch.Tensor) -> Results:
    wanted = [hidden, *(adapter.parameters() if adapter is not None else ())]
    return outputs.detach(), list(torch.autograd.grad(outputs, wanted, above.to(outputs.dtype)))


@attrs.frozen(eq=False)
class Reference:
    """What the blocks of a model are to give with each adapter, and how far off plain float32 is."""

    folder: Path
    config: Any
    hidden: torch.Tensor
    above: torch.Tensor
    exact: list[tuple[Adapter, Results]]
    bounds: tuple[float, float]
    """Of the errors of outputs and of gradients."""


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    if family == "SmolLM2":
        model = copy.deepcopy(request.getfixturevalue("plain_smollm2"))
        model.model.layers = model.model.layers[:REAL_BLOCKS]
        model.config.num_hidden_layers = REAL_BLOCKS
        model.save_pretrained(folder)
    else:
        model = save_random_model(tiny_config(family, every_expert=True), folder)
    byte_tokenizer().save_pretrained(folder)
    config, plain = model.config, model.base_model
    generator = torch.Generator().manual_seed(2)
    hidden, above = torch.randn(2, len(LENGTHS), 9, config.hidden_size, generator=generator)
    if family == "SmolLM2":  # noise is far from words, and what float32 costs then differs tenfold by chance
        words = torch.randint(config.vocab_size, hidden.shape[:2], generator=generator)
        hidden = model.get_input_embeddings()(words).detach()
    hidden.requires_grad_()
    rows_above = above[MASK.bool()]
    wide, wide_hidden = in_float64(plain), hidden.detach().double().requires_grad_()
    exact: list[tuple[Adapter, Results]] = []
    errors: list[tuple[float, float]] = []
    for adapter in adapters(config, TARGETS[family]):
        wide_adapter = None if adapter is None else copy.deepcopy(adapter).double()
        with InFloat64():
            outputs = through_here(wide, wide_hidden, wide_adapter)
            found = results(outputs, wide_hidden, wide_adapter, rows_above)
        assert adapter is None or error(found[:1], exact[0][1][:1]) > 0.01
        assert all(gradient.abs().max() > 0 for gradient in found[1])
        exact.append((adapter, found))
        for inputs in (hidden, nudged(hidden)):
            here = results(through_here(plain, inputs, adapter), inputs, adapter, rows_above)
            errors.append((error(here[:1], found[:1]), error(here[1], found[1])))
    # One run may be right by chance, where an error has few directions: the worst of six is not.
    bounds = [FACTOR * max(column) for column in zip(*errors, strict=True)]
    return Reference(folder, config, hidden, above, exact, (bounds[0], bounds[1]))


@pytest.mark.parametrize(
    ("reference", "servers"),
    [*itertools.product([family for family in TARGETS if family != "SmolLM2"], [1, 3]), ("SmolLM2", 3)],
    indirect=["reference"],
)
def test_gradients_are_those_of_the_plain_model(reference: Reference, servers: int) -> None:
    folder, hidden = reference.folder, reference.hidden
    spans = map(str, Span(0, reference.config.num_hidden_layers).split(servers))
    with served(folder, *spans) as running, sync.connect(str(running[0].node.addresses[0])) as swarm:
        model = swarm.load_model(str(folder), dtype="float32")
        swarm.wait_for_blocks(model.info, timeout=30)
        for adapter, exact in reference.exact:
            there = model.blocks(hidden, MASK, adapter=adapter)
            outputs, gradients = results(there, hidden, adapter, reference.above)
            assert error([outputs[MASK.bool()]], exact[:1]) <= reference.bounds[0]
            assert error(gradients, exact[1]) <= reference.bounds[1]
