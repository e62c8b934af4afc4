"""Attention with linear biases (ALiBi), as BLOOM and the first Falcon models have it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class AlibiBias:
    """What is added to the scores of a key at each position, kept for as many positions as were asked for.

    The softmax does not care about a constant, so the bias of a key is its slope times its position,
    whatever the query. The layers of a span share one object, so that masks are made once for all of them.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        """``make(count)`` gives the biases of the first ``count`` positions, ``[heads, count]``.

        They are to be as the model has them, rounding to its dtype included.
        """
        self._make = make
        self._table = torch.empty(1, 0, 1, 0)

    def keys(self, count: int) -> torch.Tensor:
        """float32 ``[1, heads, 1, count]``."""
        if count > self._table.shape[-1]:
            with torch.inference_mode(False):  # the backward pass has to be able to save it
                self._table = self._make(max(1024, 2 * count)).float()[None, :, None, :]
        return self._table[..., :count]
