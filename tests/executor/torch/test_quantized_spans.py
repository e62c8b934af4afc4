"""Spans on quantised weights compute what the family's own layers would with what rounding has left."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import save_random_model, tiny_config
from torch import nn

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.errors import InputError, UnsupportedModelError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId, TrainingBatch
from swarmcore.executor.torch import span as span_module
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.loader import block_needs
from swarmcore.executor.torch.quantized_layers import QuantizedExperts, QuantizedLinear
from swarmcore.executor.torch.quantized_matrix import MATRICES
from swarmcore.executor.torch.span import SpanModel, load_span
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

CPU = torch.device("cpu")
LENGTHS = (9, 4)


def load(folder: Path, weights: str | None) -> SpanModel:
    checkpoint = open_checkpoint(str(folder))
    return load_span(checkpoint, Span(1, 4), dtype=torch.float32, device=CPU, weights=weights)


def nbytes(block: nn.Module) -> int:
    """What a block's weights take as they are kept."""
    matrices = []
    for module in block.modules():
        if isinstance(module, QuantizedLinear):
            matrices.append(module.matrix)
            matrices += [] if module.bias is None else [module.bias]  # type: ignore[list-item]
        elif isinstance(module, QuantizedExperts):
            matrices += [expert.matrix for expert in module.experts]
    return sum(part.nbytes for part in (*matrices, *block.parameters()))


def run(model: SpanModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.forward(hidden, UncachedBatch(LENGTHS, CPU))


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", "int8"),
        ("llama", "int4"),
        ("gpt2", "int4"),
        ("falcon-7b", "int8"),
        ("mixtral", "int4"),
        ("gpt_oss", "int4"),
        ("llama4", "int8"),
        ("deepseek_v3", "int8"),
    ],
)
def test_equal_to_plain_layers_on_rounded_weights(family: str, weights: str, tmp_path: Path) -> None:
    """Linear layers, transposed ones, experts that are multiplied one by one or all at once; gradients."""
    save_random_model(tiny_config(family, every_expert=True), tmp_path)
    rounded, plain = load(tmp_path, weights), load(tmp_path, None)
    seen = set()
    for number in rounded.span:
        modules = dict(plain.block(number).named_modules())
        for path, module in rounded.block(number).named_modules():
            if isinstance(module, QuantizedLinear):
                weight = module.matrix.dense()
                transposed = type(modules[path]).__name__ == "Conv1D"
                modules[path].get_parameter("weight").copy_(weight.t() if transposed else weight)
                seen.add(module.matrix.kind)
            elif isinstance(module, QuantizedExperts):
                parent, _, name = path.rpartition(".")
                getattr(modules[parent], name).copy_(module.dense())
                seen |= {expert.matrix.kind for expert in module.experts}
    assert weights in seen
    needs = block_needs(
        open_checkpoint(str(tmp_path)), dtype="float32", weights=weights, device="cpu", batch_tokens=8
    )
    assert needs.weights >= max(nbytes(rounded.block(number)) for number in rounded.span)
    assert needs.weights < 1.1 * max(nbytes(rounded.block(number)) for number in rounded.span)
    hidden = torch.randn(1, sum(LENGTHS), plain._base.config.hidden_size)
    gradients = torch.randn_like(hidden)
    results = []
    for model in (rounded, plain):
        leaf = hidden.clone().requires_grad_()
        output = run(model, leaf)
        results.append((output.detach(), *torch.autograd.grad(output, leaf, gradients)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_routers_are_not_rounded(tmp_path: Path) -> None:
    save_random_model(tiny_config("deepseek_v3"), tmp_path)
    block = load(tmp_path, "int8").block(3)
    plain = [name for name, parameter in block.named_parameters() if parameter.dim() > 1]
    assert plain == ["mlp.gate.weight"]


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
def test_memory_is_that_of_what_is_kept_and_one_block(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 256, 8
    save_random_model(config, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert load_span(checkpoint, Span(0, 8), dtype=torch.float32, device=CPU, weights=weights)  # self-test
    live: list[int] = []
    quantize = span_module.quantize

    def counting(block: nn.Module, kind: str, name: str) -> None:
        gc.collect()
        live.append(_live_bytes() - before)
        quantize(block, kind, name)

    monkeypatch.setattr(span_module, "quantize", counting)
    gc.collect()
    before = _live_bytes()
    model = load_span(checkpoint, Span(0, 8), dtype=torch.float32, device=CPU, weights=weights)
    needs = block_needs(checkpoint, dtype="float32", weights=weights, device="cpu", batch_tokens=8)
    kept = nbytes(model.block(3))
    assert kept <= needs.weights <= 1.1 * kept
    plain = block_needs(checkpoint, dtype="float32", weights="auto", device="cpu", batch_tokens=8)
    assert needs.weights < plain.weights * (0.3 if weights == "int8" else 0.26)
    for number, bytes_before in enumerate(live):
        assert bytes_before < number * kept + 1.5 * plain.weights, "one block is plain at a time"


def _live_bytes() -> int:
    """Of all tensors that Python knows."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


async def test_adapters_on_rounded_weights(tmp_path: Path) -> None:
    """Low-rank updates and prefixes, in steps and in training, as on plain weights of the same values."""
    model = save_random_model(tiny_config("llama"), tmp_path / "model")
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = MATRICES["int4"](module.weight.data, "").dense()
    model.save_pretrained(tmp_path / "rounded")
    tensors = [
        to_wire(f"{block}.{name}", torch.randn(shape) / 4)
        for block in range(1, 4)
        for name, shape in {
            "self_attn.q_proj.lora_A": (3, 64),
            "self_attn.q_proj.lora_B": (64, 3),
            "mlp.down_proj.lora_A": (3, 96),
            "mlp.down_proj.lora_B": (64, 3),
            "prefix": (2, 5, 2, 16),
        }.items()
    ]
    hidden, gradient = torch.randn(sum(LENGTHS), 64), torch.randn(sum(LENGTHS), 64)
    results = []
    for folder, weights in (("model", "int4"), ("rounded", "auto")):
        executor = TorchExecutor.load(
            open_checkpoint(str(tmp_path / folder)), Span(1, 4), weights=weights, threads=1
        )
        adapter = await executor.load_adapter(tensors, 0.75)
        batch = TrainingBatch(executor.span, LENGTHS, to_wire("hidden", hidden), adapter)
        backward = executor.backward(batch, to_wire("hidden", gradient), weights=True)
        while not await backward.advance(100):
            pass
        backward.close()
        assert backward.gradients is not None
        sequence = SequenceId(0)
        executor.reserve(sequence, LENGTHS[0] + adapter.prefix_tokens)
        step = ScheduledChunk(
            to_wire("hidden", hidden[: LENGTHS[0]]),
            0,
            executor.span,
            (Segment(sequence, 0, LENGTHS[0]),),
            adapter=adapter,
        )
        [output] = await executor.step([step])
        assert isinstance(output, Tensor)
        results.append([to_torch(each) for each in (output, backward.gradients, *backward.weights)])
        await executor.close()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_go_with_a_dtype(tiny_llama: Checkpoint) -> None:
    with pytest.raises(InputError, match="bf16 and dtype float32"):
        TorchExecutor.load(tiny_llama, Span(0, 1), weights="bf16", dtype="float32")
    executor = TorchExecutor.load(tiny_llama, Span(0, 1), weights="bf16")
    assert executor.dtype == "bfloat16"


def test_the_block_is_named_whose_weights_cannot_be_rounded(tmp_path: Path) -> None:
    model = save_random_model(tiny_config("llama"), tmp_path)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"weight in mlp\.up_proj of block 2"):
        load(tmp_path, "int8")
