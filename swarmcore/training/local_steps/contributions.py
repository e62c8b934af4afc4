"""What peers give to a round: deltas on their way, what is signed of them, and their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import attrs
import torch

from swarmcore.errors import DeltaError, ProtocolError
from swarmcore.identity import Identity, verify
from swarmcore.training.local_steps.vectors import ErrorFeedback, decode, encode
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms
from swarmcore.wire.tensors import Tensor

LARGEST_NORM = 5.0
"""Norms are clipped to so many times the median one."""
LARGEST_WEIGHT = 4
"""Samples count up to so many times the median number."""


def shares(lengths: Sequence[float], samples: Sequence[int]) -> tuple[list[float], int]:
    """What each delta is multiplied by in the mean, and all samples that count.

    Deltas have a share by their samples. One whose norm, its length, is above five times the median norm is
    scaled down to that, and samples above four times their median are counted as that: one peer of many can
    neither throw the others off nor outvote them. The lower median is taken, of two the lesser.
    """
    limit = LARGEST_NORM * _lower_median([length for length in lengths if length > 0])
    most = LARGEST_WEIGHT * math.ceil(_lower_median(samples))
    counted = [min(many, most) for many in samples]
    total = sum(counted)
    scales = [limit / length if length > limit else 1.0 for length in lengths]
    return [scale * many / total for scale, many in zip(scales, counted, strict=True)], total


def average(deltas: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """The sum of ``deltas``, each ``[values]`` in float32, by their `shares`, added in their order."""
    mean = torch.zeros_like(deltas[0])
    for delta, factor in zip(deltas, factors, strict=True):
        # Not in one fused operation, whose rounding would depend on the processor.
        mean += delta * factor
    return mean


def norm(values: torch.Tensor, whose: str) -> float:
    """Euclidean. Raise `DeltaError`, which says ``whose`` they are, unless all values are finite."""
    length = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if not math.isfinite(length):
        raise DeltaError(
            f"{whose} has values that are not finite: training has diverged where it comes from; lower the "
            f"learning rate there, clip the gradients"
        )
    return length


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


MOST_SAMPLES = 2**40

_DOMAIN = "swarmcore local-steps delta 1"
"""Nothing else that is signed with the same key begins so."""


def contribute(
    identity: Identity, terms: RunTerms, lineage: Lineage, *, delivery: int, samples: int, length: float
) -> Contribution:
    """The signed claim that a delta of that norm, its length, belongs into the round after ``lineage``."""
    unsigned = Contribution(identity.peer, delivery, samples, length)
    return Contribution(
        identity.peer, delivery, samples, length, identity.sign(_signed(unsigned, terms, lineage))
    )


def is_sound(contribution: Contribution, terms: RunTerms, lineage: Lineage) -> bool:
    """Whether its peer has signed it, for the round after ``lineage``, and its numbers are in range."""
    return (
        0 < contribution.samples <= MOST_SAMPLES
        and 0 <= contribution.length < math.inf
        and verify(contribution.peer, _signed(contribution, terms, lineage), contribution.signature)
    )


def longest_mean(record: RoundResult, terms: RunTerms) -> float:
    """The greatest norm that the mean of a round can have, by the claims that are in it.

    Raise `ProtocolError` when it has none, two of one peer, one that its peer did not sign for this round, or
    when its work is not what the claims come to.
    """
    claims = record.contributions
    if not claims or len({claim.peer for claim in claims}) < len(claims):
        raise ProtocolError("the result of a round has no contributions, or several of one peer")
    if not all(is_sound(claim, terms, record.previous) for claim in claims):
        raise ProtocolError("the result of a round has a contribution that its peer did not sign for it")
    lengths = [claim.length for claim in claims]
    factors, work = shares(lengths, [claim.samples for claim in claims])
    if record.work != work:
        raise ProtocolError(
            f"the result of a round claims {record.work} samples; of its contributions {work} count"
        )
    return sum(factor * length for factor, length in zip(factors, lengths, strict=True))


def _signed(claim: Contribution, terms: RunTerms, lineage: Lineage) -> bytes:
    claimed = (terms.run, terms.layout, lineage.state, claim.delivery, claim.samples, claim.length.hex())
    return "\0".join((_DOMAIN, *map(str, claimed))).encode()


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
