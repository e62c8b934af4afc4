"""Low-rank updates and prefixes in forward and backward passes, against peft's own on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from applied_adapter import low_rank_updates
from exact_results import FACTOR, InFloat64, error, in_float64, nudged
from passes_of_rows import LENGTHS, inputs_of, relative, run_blocks, through
from tiny_models import save_random_model, tiny_config
from transformers import AutoModelForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.errors import AdapterError
from swarmcore.executor.base import Adapter, TrainingBatch
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.training import LoraAdapter
from swarmcore.types import Span

# What peft does with a model gives warnings about the future of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning")

SCALING = 0.75
RANK = 3
PREFIX = 5

PROJECTIONS = {
    "llama": ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.k_proj", "mlp.up_proj"],
    "gemma3": ["self_attn.q_proj", "mlp.gate_proj"],
    "mixtral": ["self_attn.q_proj", "self_attn.o_proj"],
    "bloom": ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"],
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
}


async def train(
    executor: TorchExecutor, adapter: Adapter, hidden: torch.Tensor, gradient: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs, and gradients of inputs and of the adapter's weights."""
    batch = TrainingBatch(executor.span, LENGTHS, to_wire("hidden", hidden), adapter)
    forward = await through(executor.forward(batch, keep=keep), 20)
    backward = executor.backward(
        batch, to_wire("hidden", gradient), kept=forward if keep else None, weights=True
    )
    await through(backward, 20)
    backward.close()
    weights = {tensor.name: to_torch(tensor) for tensor in backward.weights}
    assert backward.gradients is not None
    return to_torch(forward.outputs), to_torch(backward.gradients), weights


def on_the_wire(weights: Mapping[str, torch.Tensor]) -> list[Any]:
    return [to_wire(name, weight) for name, weight in weights.items()]


def expected_of(
    model: Any, weights: list[torch.Tensor], hidden: torch.Tensor, gradient: torch.Tensor, cache: Any = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    leaf = hidden.clone().requires_grad_()
    outputs = torch.cat([run_blocks(model, rows, cache and cache()) for rows in leaf.split(LENGTHS)])
    found, *rest = torch.autograd.grad(outputs, [leaf, *weights], gradient)
    return outputs, found, tuple(rest)


@pytest.mark.parametrize("family", PROJECTIONS)
async def test_low_rank_updates_equal_those_of_peft(family: str, tmp_path: Path) -> None:
    model = save_random_model(tiny_config(family), tmp_path)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=SCALING * RANK,
        target_modules=rf".*\.\d+\.({'|'.join(PROJECTIONS[family])})",
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(model, config).get_base_model()
    hidden, gradient = inputs_of(LENGTHS)
    weights = {
        ".".join(name.split(".")[2:]).replace(".default.weight", ""): parameter
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    assert len(weights) == 2 * len(PROJECTIONS[family]) * theirs.config.num_hidden_layers
    expected = expected_of(theirs, list(weights.values()), hidden, gradient)
    checkpoint = open_checkpoint(str(tmp_path))
    span = Span(0, checkpoint.info.blocks)
    executor = TorchExecutor.load(checkpoint, span, dtype="float32", threads=1)
    adapter = await executor.load_adapter(on_the_wire(weights), SCALING)
    assert adapter.span == span and not adapter.prefix_tokens
    for keep in (False, True):
        outputs, back, found = await train(executor, adapter, hidden, gradient, keep)
        assert relative(outputs, expected[0]) < 1e-4
        assert relative(back, expected[1]) < 1e-4
        for name, theirs_ in zip(weights, expected[2], strict=True):
            assert relative(found[name], theirs_) < 1e-4
    # And the frozen blocks are for everyone else what they were.
    plain = await through(executor.forward(TrainingBatch(span, LENGTHS, to_wire("hidden", hidden))), 100)
    assert relative(to_torch(plain.outputs), expected[0]) > 1e-2
    await executor.close()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "gpt_oss"])
async def test_prefixes_equal_those_of_peft(family: str, tmp_path: Path) -> None:
    model = save_random_model(tiny_config(family), tmp_path)
    tuned = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    )
    prompt = tuned.prompt_encoder["default"].embedding.weight
    layers = model.config.num_hidden_layers
    hidden, gradient = inputs_of(LENGTHS)
    outputs, inputs, [of_prompt] = expected_of(model, [prompt], hidden, gradient, lambda: tuned.get_prompt(1))

    def by_block(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        heads = peft_heads(tuned)
        split = weight.detach().view(PREFIX, layers, 2, heads, -1).permute(1, 2, 0, 3, 4)
        return {f"{block}.prefix": split[block] for block in range(layers)}

    executor = TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(0, layers), dtype="float32", threads=1)
    adapter = await executor.load_adapter(on_the_wire(by_block(prompt)), 1.0)
    assert adapter.prefix_tokens == PREFIX
    for keep in (False, True):
        got, back, found = await train(executor, adapter, hidden, gradient, keep)
        assert relative(got, outputs) < 1e-4
        assert relative(back, inputs) < 1e-4
        scale = of_prompt.abs().max()
        for name, theirs in by_block(of_prompt).items():
            assert ((found[name] - theirs).abs().max() / scale).item() < 1e-4
    await executor.close()


def peft_heads(tuned: Any) -> int:
    heads: int = tuned.peft_config["default"].num_attention_heads
    return heads


def updated(model: Any, updates: LoraAdapter, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of the inputs of a model with low-rank updates."""
    leaf = hidden.clone().requires_grad_()
    with low_rank_updates(model, updates):
        outputs = torch.cat([run_blocks(model, rows) for rows in leaf.split(LENGTHS)])
    return torch.autograd.grad(outputs, leaf, gradient.to(outputs.dtype))[0]


async def test_only_what_is_wanted_is_computed(
    tiny_llama: Checkpoint, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = TorchExecutor.load(tiny_llama, Span(0, 5), dtype="float32", threads=1)
    generator = torch.Generator().manual_seed(5)
    weights = {
        "3.self_attn.q_proj.lora_A": torch.randn(2, 64, generator=generator),
        "3.self_attn.q_proj.lora_B": torch.randn(64, 2, generator=generator).bfloat16(),
        "4.prefix": torch.randn(2, 1, 2, 16, generator=generator),
    }
    low_rank = await executor.load_adapter(on_the_wire(dict(list(weights.items())[:2])), 1.0)
    hidden, gradient = inputs_of(LENGTHS)
    _, _, expected = await train(executor, low_rank, hidden, gradient, False)
    assert expected["3.self_attn.q_proj.lora_B"].dtype == torch.bfloat16

    passed: list[Any] = []
    original = torch.autograd.grad

    def counting(outputs: Any, *others: Any, **options: Any) -> Any:
        passed.append(outputs)
        return original(outputs, *others, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    batch = TrainingBatch(Span(0, 5), LENGTHS, to_wire("hidden", hidden), low_rank)
    backward = executor.backward(batch, to_wire("hidden", gradient), inputs=False, weights=True)
    await through(backward, 1000)
    assert backward.gradients is None and len(passed) == 2
    for tensor in backward.weights:
        # Other units round otherwise, and one of the weights is in 16 bits.
        assert relative(to_torch(tensor), expected[tensor.name]) < 1e-2

    backward = executor.backward(batch, to_wire("hidden", gradient))
    await through(backward, 1000)
    assert not backward.weights and backward.gradients is not None
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).base_model
    updates = LoraAdapter({name: weights[name].float() for name in expected}, rank=2, scaling=1.0)
    wide = copy.deepcopy(updates).double()
    with InFloat64():
        exact = updated(in_float64(plain), wide, hidden.double(), gradient)
    off = [error([updated(plain, updates, rows, gradient)], [exact]) for rows in (hidden, nudged(hidden))]
    assert error([to_torch(backward.gradients)], [exact]) <= FACTOR * max(off)

    # A part of the span gives the gradients of its own weights only.
    part = TrainingBatch(Span(0, 3), LENGTHS, to_wire("hidden", hidden), low_rank)
    backward = executor.backward(part, to_wire("hidden", gradient), inputs=False, weights=True)
    await through(backward, 1000)
    assert not backward.weights

    lacking = await executor.load_adapter(on_the_wire(weights), 1.0)
    with pytest.raises(AdapterError, match="none for block 0"):
        executor.forward(TrainingBatch(Span(0, 5), LENGTHS, to_wire("hidden", hidden), lacking))
    await executor.close()


@pytest.mark.parametrize(
    ("family", "module"),
    [("mixtral", "mlp.experts.0.w1"), ("mixtral", "mlp.experts"), ("gpt_oss", "mlp.experts.gate_up_proj")],
)
async def test_routed_experts_take_no_adapters(family: str, module: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    executor = TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(0, 1), dtype="float32", threads=1)
    weights = {f"0.{module}.lora_A": torch.zeros(1, 64), f"0.{module}.lora_B": torch.zeros(96, 1)}
    with pytest.raises(AdapterError, match="routed experts"):
        await executor.load_adapter(on_the_wire(weights), 1.0)
    await executor.close()
