"""Whole sequences through a span without a cache, forward and back, as an executor runs them.

A pass is computed a unit at a time, so that interactive steps can go in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs

from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


class Adapter:
    """Small weights that a backend has made ready to be used with its blocks; freed with the last reference.

    Of the kinds that `swarmcore.wire.passes.AdapterPart` names.
    """

    span: Span
    """The blocks that it has weights for, or none in between."""
    nbytes: int
    """Memory that it takes."""
    prefix_tokens: int = 0
    """Positions that it puts before the first token of every sequence."""


@attrs.define(eq=False)
class SequenceBatch:
    """Sequences from their first token on, to go through the blocks ``span``."""

    span: Span
    lengths: tuple[int, ...]
    """Tokens of each sequence, one or more."""
    hidden: Tensor
    """``[sum(lengths), hidden size]``, encoded as it came."""
    adapter: Adapter | None = None
    reproducible: bool = False
    """Compute in an order that depends on the batch alone."""
    padding: bool = False
    """The rows attend to nothing, not even to themselves: what attention adds to them is 0."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class BatchPass(ABC):
    """A pass under way. Close it in any case; its results stay."""

    seconds: float = 0.0
    """Time at work on it so far."""
    token_bytes: float = 0.0
    """Memory that activations of a token in a block turned out to take; 0 as long as that is not known, and
    for a pass that computes none to be held."""

    @abstractmethod
    async def advance(self, max_tokens: int) -> bool:
        """Compute the next unit, such as some sequences through one block; return whether it was the last.

        A unit is of ``max_tokens`` tokens at most, but of one sequence at least, and of what was together in
        a kept forward pass; a reproducible batch is cut in one way always. Never blocks the event loop;
        does not overlap with `BlockExecutor.step` or another pass. Raise `InvalidBatchError` for rows or
        gradients of a wrong shape or with values that are not finite, `ServerMemoryError` when memory runs
        out; the pass is over then, and everything else unharmed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. Harmless when repeated; not while `advance` runs."""


class ForwardPass(BatchPass):
    """Its result is `outputs`."""

    outputs: Tensor
    """``[tokens, hidden size]``, raw, in the executor's dtype; once it is through."""
    kept_bytes: int = 0
    """Memory of the activations that it keeps until it is closed; grows with each unit."""

    @abstractmethod
    def forget(self) -> None:
        """Keep no activations after all; those that it has are freed. Not while `advance` runs."""


class BackwardPass(BatchPass):
    """Its results are `gradients` and `weights`."""

    gradients: Tensor | None = None
    """Of the inputs, ``[tokens, hidden size]``, raw, in the executor's dtype; if they were asked for."""
    weights: tuple[Tensor, ...] = ()
    """Of the adapter's weights, under their names, in their dtypes; if they were asked for."""
