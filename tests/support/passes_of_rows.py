"""Rows through the blocks of a whole model of transformers, and through the passes of an executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from swarmcore.executor.torch.partial_model import find_base, layer_list

LENGTHS = (14, 14, 11, 3)


def run_blocks(model: Any, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """What comes out of the last block of the whole model for one sequence, ``[tokens, hidden size]``.

    ``hidden`` is what the first block is given, ``cache`` what transformers has cached before it.
    """
    base = find_base(model)[1]
    blocks = getattr(base, layer_list(base))
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
    model(torch.zeros(1, len(hidden), dtype=torch.long), past_key_values=cache, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen[0][0]


async def through(work: Any, max_tokens: int) -> Any:
    while not await work.advance(max_tokens):
        pass
    return work


def inputs_of(lengths: Sequence[int], width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden, gradient = torch.randn(2, sum(lengths), width, generator=generator)
    return hidden, gradient


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()
