"""Forward and backward passes of every family against autograd through the whole model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_results import FACTOR, InFloat64, error, in_float64, nudged
from passes_of_rows import LENGTHS, inputs_of, relative, run_blocks, through
from tiny_models import FAMILIES, save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.base import TrainingBatch
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span


async def forward_and_back(
    chain: Sequence[TorchExecutor],
    lengths: tuple[int, ...],
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    *,
    max_tokens: int = 1000,
    keep: bool = False,
    reproducible: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the gradients of the inputs, through all executors."""
    rows, steps = to_wire("hidden", hidden), []
    for executor in chain:
        batch = TrainingBatch(executor.span, lengths, rows, reproducible=reproducible)
        work = await through(executor.forward(batch, keep=keep), max_tokens)
        rows = work.outputs
        steps.append((executor, batch, work))
    back = to_wire("hidden", gradient)
    for executor, batch, work in reversed(steps):
        backward = executor.backward(batch, back, kept=work if keep else None)
        back = (await through(backward, max_tokens)).gradients
        work.close()
        backward.close()
    return to_torch(rows), to_torch(back)


@pytest.mark.parametrize("family", FAMILIES)
async def test_outputs_and_gradients_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    model = save_random_model(tiny_config(family), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    hidden, gradient = inputs_of(LENGTHS)
    leaf = hidden.clone().requires_grad_()
    outputs = torch.cat([run_blocks(model, rows) for rows in leaf.split(LENGTHS)])
    [expected] = torch.autograd.grad(outputs, leaf, gradient)
    blocks = checkpoint.info.blocks
    chain = [
        TorchExecutor.load(checkpoint, span, dtype="float32", threads=1)
        for span in (Span(0, 2), Span(2, blocks))
    ]
    for keep, max_tokens in ((False, 1000), (True, 30), (False, 1)):
        got, back = await forward_and_back(chain, LENGTHS, hidden, gradient, max_tokens=max_tokens, keep=keep)
        assert relative(got, outputs) < 1e-4
        assert relative(back, expected) < 1e-4
    for executor in chain:
        await executor.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_a_reproducible_batch_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    lengths = (60, 60, 33, 80, 2, 9)
    hidden, gradient = inputs_of(lengths)
    executor = TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(0, 5), dtype="float32", threads=1)
    first, *others = [
        await forward_and_back(
            [executor], lengths, hidden, gradient, max_tokens=most, keep=keep, reproducible=True
        )
        for most, keep in ((1, False), (150, False), (1000, True), (70, True))
    ]
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    await executor.close()


async def test_the_real_model(smollm2_folder: Path, plain_smollm2: Any) -> None:
    lengths, plain = (9, 9, 4), plain_smollm2.base_model
    _, gradient = inputs_of(lengths, 576)
    # Of noise, which is far from words, what float32 costs would differ tenfold by chance.
    words = torch.arange(0, 49000, 49000 // sum(lengths))[: sum(lengths)]
    hidden = plain_smollm2.get_input_embeddings()(words).detach()

    def here(model: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = rows.clone().requires_grad_()
        outputs = torch.cat([run_blocks(model, part) for part in leaf.split(lengths)])
        return outputs.detach(), torch.autograd.grad(outputs, leaf, gradient.to(outputs.dtype))[0]

    with InFloat64():
        exact = here(in_float64(plain), hidden.double())
    # Float32 may be right by chance, where an error has few directions: the worst of four is not.
    off = [here(plain, rows) for rows in (hidden, *(nudged(hidden, seed) for seed in range(3)))]
    checkpoint = open_checkpoint(str(smollm2_folder))
    executor = TorchExecutor.load(checkpoint, Span(0, 30), dtype="float32", threads=1)
    found = await forward_and_back([executor], lengths, hidden, gradient)
    for one, wanted, others in zip(found, exact, zip(*off, strict=True), strict=True):
        assert error([one], [wanted]) <= FACTOR * max(error([other], [wanted]) for other in others)
    await executor.close()


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bloom", "gpt2"])
async def test_bfloat16_trains_too(family: str, tmp_path: Path) -> None:
    model = save_random_model(tiny_config(family, every_expert=True), tmp_path)
    hidden, gradient = inputs_of(LENGTHS)
    leaf = hidden.clone().requires_grad_()
    outputs = torch.cat([run_blocks(model, rows) for rows in leaf.split(LENGTHS)])
    [expected] = torch.autograd.grad(outputs, leaf, gradient)
    checkpoint = open_checkpoint(str(tmp_path))
    executor = TorchExecutor.load(checkpoint, Span(0, 5), dtype="bfloat16", threads=1)
    got, back = await forward_and_back([executor], LENGTHS, hidden, gradient)
    assert (got.float() - outputs).norm() < 0.05 * outputs.norm()
    assert (back.float() - expected).norm() < 0.05 * expected.norm()
    await executor.close()
