"""Sequences of a padded batch as rows without padding, in groups, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from swarmcore.client.adapters import AdapterWeights
from swarmcore.errors import InputError, ProtocolError
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.tensors import Tensor

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter


class PackedRows:
    """Which of ``[batch, tokens]`` are tokens, and how they are packed, one sequence after the other."""

    def __init__(self, shape: tuple[int, int], mask: torch.Tensor | None) -> None:
        """``mask`` is 0 for padding, at either end of a sequence; None where there is none.

        Raise `InputError` for a mask of another shape, with holes, or without any token.
        """
        self.shape = shape
        batch, tokens = shape
        self._index: torch.Tensor | None = None
        lengths = [tokens] * batch
        if mask is not None:
            kept = _checked(mask, shape)
            lengths = kept.sum(1).tolist()
            if sum(lengths) < batch * tokens:
                self._index = kept.flatten().nonzero()[:, 0]
        self.lengths: tuple[int, ...] = tuple(length for length in lengths if length)

    def groups(self, tokens: int) -> list[tuple[int, ...]]:
        """The lengths of consecutive sequences, in groups of at most so many tokens, or of one sequence."""
        groups: list[list[int]] = []
        for length in self.lengths:
            if groups and sum(groups[-1]) + length <= tokens:
                groups[-1].append(length)
            else:
                groups.append([length])
        return [tuple(group) for group in groups]

    def pack(self, values: torch.Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
        """Values ``[batch, tokens, size]`` as one tensor of rows for each group; copied."""
        rows = values.detach().reshape(-1, values.shape[-1])
        rows = rows.clone() if self._index is None else rows[self._index.to(rows.device)]
        return [to_wire("hidden", part) for part in rows.split_with_sizes([sum(each) for each in groups])]

    def unpack(self, parts: Sequence[Tensor], like: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`, in the dtype and on the device of ``like``, with zeros for padding."""
        rows = torch.cat([to_torch(part) for part in parts]).to(like.device, like.dtype)
        if rows.shape[0] != sum(self.lengths):
            raise ProtocolError(f"{rows.shape[0]} rows came back of {sum(self.lengths)}")
        if self._index is not None:
            whole = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1])
            whole[self._index.to(rows.device)] = rows
            rows = whole
        return rows.view(*self.shape, -1)


def _checked(mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if tuple(mask.shape) != shape:
        raise InputError(
            f"the attention mask has shape {list(mask.shape)}; expected {list(shape)}: 1 for each token, 0 "
            f"for padding"
        )
    kept = mask != 0
    steps = kept.int().diff(dim=1)
    begins = kept[:, 0].int() + (steps == 1).sum(1)
    if (begins > 1).any():
        raise InputError("the attention mask has holes; padding may only be at the ends of a sequence")
    if not kept.any():
        raise InputError("the attention mask leaves no token")
    return kept


def snapshot(adapter: BlockAdapter | str | None, span: Span) -> AdapterWeights | None:
    """The weights for ``span`` as they are now, whatever an optimiser does to them afterwards.

    A string names an adapter that the servers have. None where there is nothing to use.
    """
    if adapter is None or isinstance(adapter, str):
        return AdapterWeights(AdapterName(name=adapter)) if adapter else None
    tensors: dict[int, list[Tensor]] = {}
    for name, weight in adapter.named_weights(span).items():
        block = int(name.partition(".")[0])
        tensors.setdefault(block, []).append(to_wire(name, weight.detach().clone()))
    if not tensors:
        return None
    weights = {block: tuple(found) for block, found in tensors.items()}
    return AdapterWeights(AdapterName(version=adapter.version), adapter.scaling, weights)
