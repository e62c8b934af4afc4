"""Low-rank updates of remote blocks' projections (LoRA, arXiv 2106.09685), as PEFT does them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from torch import nn

from swarmcore.errors import AdapterError
from swarmcore.training.adapter import BlockAdapter
from swarmcore.training.model_layout import ModelLayout, Projection
from swarmcore.types import Span


class LoraAdapter(BlockAdapter):
    """For each chosen projection ``y = W x`` of a block: ``y = W x + scaling * lora_B lora_A x``.

    ``lora_A`` is ``[rank, inputs]`` and ``lora_B`` ``[outputs, rank]`` for every family, also where the
    family stores its weights the other way round.
    """

    rank: int
    """Of most of its projections; a file may give some of them another one."""
    rslora: bool
    """Whether `scaling` is alpha over the square root of the rank instead of over the rank."""
    dropout: float
    """PEFT's ``lora_dropout`` of a file; servers draw none, so that it has to be 0 where it is trained."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        *,
        rank: int,
        scaling: float,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Of weights under their names on the wire; `for_model` makes new ones."""
        super().__init__(scaling=scaling)
        self.rank = rank
        self.rslora = rslora
        self.dropout = dropout
        for name, values in weights.items():
            self._add_weight(name, values)

    @classmethod
    def for_model(
        cls,
        model_config: Any,
        *,
        blocks: Span | Collection[int] | None = None,
        targets: str | Collection[str] = ("q_proj", "v_proj"),
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """New updates, which change nothing yet: ``lora_A`` is random as PEFT's, ``lora_B`` zero.

        ``model_config`` is the Transformers config of the whole model; no weights are read. ``blocks`` are
        all blocks where None. ``targets`` are names as in PEFT's ``target_modules``, ``"all-linear"``
        included. Without a ``seed``, torch's global generator is used.

        Raise `AdapterError` for targets that the blocks do not have (it lists what they have), a rank below
        1, and any dropout: it would have to be drawn by the servers, inside of their blocks.
        """
        if rank < 1:
            raise AdapterError(f"the rank must be 1 or more, got {rank}")
        if dropout:
            raise AdapterError(
                f"dropout inside of remote blocks is not possible, got {dropout}; leave it at 0 and use "
                f"weight decay, or dropout in a module of your own between blocks"
            )
        layout = ModelLayout.of(model_config)
        if blocks is None or isinstance(blocks, Span):
            span = layout.span(blocks)
            blocks = range(span.start, span.end)
        for block in blocks:
            layout.span(Span(block, block + 1))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        weights: dict[str, torch.Tensor] = {}
        for projection in layout.select(targets, blocks):
            weights |= _new_update(projection, rank, generator, dtype)
        return cls(weights, rank=rank, scaling=lora_scaling(rank, alpha, rslora), rslora=rslora)

    def alpha_of(self, rank: int) -> float:
        """PEFT's ``lora_alpha`` for projections of that rank."""
        return self.scaling * (math.sqrt(rank) if self.rslora else rank)


def lora_scaling(rank: int, alpha: float, rslora: bool) -> float:
    """What the product of an update is multiplied by; rank-stabilised after arXiv 2312.03732."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _new_update(
    projection: Projection, rank: int, generator: torch.Generator | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    # Drawn in float32 for all dtypes, so that a seed means the same values in each.
    down = torch.empty(rank, projection.inputs, dtype=torch.float32)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return {
        f"{projection.name}.lora_A": down.to(dtype),
        f"{projection.name}.lora_B": torch.zeros(projection.outputs, rank, dtype=dtype),
    }
