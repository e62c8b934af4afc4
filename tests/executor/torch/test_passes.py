"""Forward and backward passes of every family against autograd through the whole model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_random_model, tiny_config

from swarmcore.executor.passes import SequenceBatch
from swarmcore.executor.torch.checkpoint import open_checkpoint
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.tensors import to_torch, to_wire
from swarmcore.types import Span

LENGTHS = (14, 14, 11, 3)


def run_blocks(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What comes out of the last block of the whole model for one sequence, ``[tokens, hidden size]``.

    ``hidden`` is what the first block is given.
    """
    base = model.base_model
    blocks = next(child for child in base.children() if isinstance(child, torch.nn.ModuleList))
    seen: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (hidden[None], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden[None]}

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    model(torch.zeros(1, len(hidden), dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen[0][0]


async def through(work: Any, max_tokens: int) -> Any:
    while not await work.advance(max_tokens):
        pass
    return work


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
        batch = SequenceBatch(executor.span, lengths, rows, reproducible=reproducible)
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


def inputs_of(lengths: Sequence[int], width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden, gradient = torch.randn(2, sum(lengths), width, generator=generator)
    return hidden, gradient


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


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
