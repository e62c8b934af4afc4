"""A delta on its way into a run."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import attrs
import torch

from swarmcore.executor.torch.error_feedback import ErrorFeedback
from swarmcore.training.local_steps.averaging import norm
from swarmcore.training.local_steps.pieces import decode, encode
from swarmcore.wire.tensors import Tensor


@attrs.frozen(eq=False)
class Outgoing:
    """A delta as it is delivered: the same values under the same number, until they are known to have got in.

    It may be in a round that is open on another peer whatever has become of the wait for it. What has been
    learned since must therefore not be delivered in its place, or the run would have its part twice.
    """

    delta: torch.Tensor
    """As it was learned; ``pieces`` have what the codec made of that, and of what it dropped before."""
    samples: int
    delivery: int
    pieces: Sequence[Tensor]
    length: float
    """The norm of what is in ``pieces``."""


def prepare(
    delta: torch.Tensor, samples: int, codec: str, residuals: ErrorFeedback, rng: Random
) -> tuple[Outgoing, ErrorFeedback]:
    """A new one, and what its encoding leaves for the next.

    Raise `DeltaError` for values that are not finite.
    """
    norm(delta, "the delta")
    left = ErrorFeedback()
    left.load_state_dict(residuals.state_dict())
    pieces = encode(delta, codec, left)
    return Outgoing(delta, samples, rng.getrandbits(63), pieces, norm(decode(pieces), "the delta")), left


def restored(delta: torch.Tensor, values: torch.Tensor, samples: int, delivery: int) -> Outgoing:
    """One that was on its way when the peer's state was saved: the same values, raw."""
    return Outgoing(delta, samples, delivery, encode(values, "raw"), norm(values, "the delta"))
