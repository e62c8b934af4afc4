"""Several sequences in one row, told apart by their position ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from swarmcore.errors import InputError


class Packing:
    """Takes rows apart into their sequences, and puts them together again; both are differentiable."""

    def __init__(self, starts: torch.Tensor) -> None:
        """``starts`` ``[rows, columns]`` says where a sequence begins."""
        self._shape = starts.shape
        flat = starts.flatten().nonzero()[:, 0]
        ends = torch.cat([flat[1:], flat.new_tensor([starts.numel()])])
        lengths = ends - flat
        columns = torch.arange(int(lengths.max()), device=starts.device)
        self._mask = columns < lengths[:, None]
        self._index = (flat[:, None] + columns).clamp(max=starts.numel() - 1)

    @classmethod
    def of(cls, positions: torch.Tensor) -> Self | None:
        """Of rows in which a sequence ends where ``positions`` ``[rows, columns]`` do not go on by one.

        None where each row is one sequence.
        """
        starts = _starts(positions)
        return cls(starts) if starts[:, 1:].any() else None

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, columns, size]`` as ``[sequences, longest, size]`` with zeros behind the shorter ones, and
        the mask of what is none of these."""
        rows = hidden.flatten(0, 1)[self._index.to(hidden.device)]
        mask = self._mask.to(hidden.device)
        return rows * mask[..., None].to(rows.dtype), mask

    def join(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        return hidden[self._mask.to(hidden.device)].view(*self._shape, -1)


def check_packed(given: Mapping[str, Any]) -> None:
    """Raise `InputError` unless position ids tell the same sequences apart as the boundaries given, for which
    some attention kernels ask."""
    positions, ends = given.get("position_ids"), given.get("cu_seq_lens_q")
    if positions is None:
        raise InputError(
            "pass position_ids: they tell packed sequences apart here, not cu_seq_lens or seq_idx"
        )
    if ends is None or positions.dim() != 2:
        return
    starts = _starts(positions).flatten().nonzero()[:, 0]
    told = torch.as_tensor(ends).flatten().to(starts)
    if not torch.equal(told, torch.cat([starts, starts.new_tensor([positions.numel()])])):
        raise InputError("cu_seq_lens_q and position_ids tell other sequences apart: leave out cu_seq_lens_q")


def _starts(positions: torch.Tensor) -> torch.Tensor:
    """Where ``positions`` ``[rows, columns]`` do not go on by one, and where rows begin, as a mask."""
    jumps = positions.diff(dim=1) != 1
    return torch.cat([torch.ones_like(jumps[:, :1]), jumps], dim=1)
