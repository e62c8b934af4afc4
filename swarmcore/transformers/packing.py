"""Several sequences in one row, told apart by their position ids."""

from __future__ import annotations

from typing import Self

import torch


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
        jumps = positions.diff(dim=1) != 1
        if not jumps.any():
            return None
        return cls(torch.cat([torch.ones_like(jumps[:, :1]), jumps], dim=1))

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, columns, size]`` as ``[sequences, longest, size]`` with zeros behind the shorter ones, and
        the mask of what is none of these."""
        rows = hidden.flatten(0, 1)[self._index.to(hidden.device)]
        mask = self._mask.to(hidden.device)
        return rows * mask[..., None].to(rows.dtype), mask

    def join(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        return hidden[self._mask.to(hidden.device)].view(*self._shape, -1)
