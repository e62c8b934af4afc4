"""Projections inside of blocks that adapters change, without the modules being any adapter's own.

A hook on each such module asks the batch that is being computed what to add for its rows.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Target:
    """A projection in a block that adapters may change."""

    def __init__(self, block: int, module: str) -> None:
        """``module`` is its name inside of the block ``block``."""
        self.block, self.module = block, module
        self.lora_a, self.lora_b = f"{block}.{module}.lora_A", f"{block}.{module}.lora_B"
        """What an adapter's weights for it are called."""


class Updates(Protocol):
    """What adapters add to the outputs of projections in one batch."""

    def add(self, target: Target, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The projection's ``output`` for the inputs ``rows``, with what is added to it.

        Both have the batch's tokens in order. May change ``output``.
        """
