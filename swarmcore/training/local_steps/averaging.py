"""The mean of several peers' deltas, of which a few may be far off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from swarmcore.errors import DeltaError

LARGEST_NORM = 5.0
"""Norms are clipped to so many times the median one."""
LARGEST_WEIGHT = 4
"""Samples count up to so many times the median number."""


def average(deltas: Sequence[torch.Tensor], samples: Sequence[int]) -> tuple[torch.Tensor, int]:
    """The mean of ``deltas``, each ``[values]`` in float32, weighted by their samples; and all samples.

    A delta whose norm is above five times the median norm is scaled down to that, and samples above four
    times their median are counted as that: one peer of many can neither throw the others off nor outvote
    them. The lower median is taken, of two the lesser. The order of addition is that of ``deltas``.
    """
    norms = [norm(delta) for delta in deltas]
    limit = LARGEST_NORM * _lower_median([one for one in norms if one > 0])
    most = LARGEST_WEIGHT * math.ceil(_lower_median(samples))
    counted = [min(many, most) for many in samples]
    total = sum(counted)
    mean = torch.zeros_like(deltas[0])
    for delta, length, many in zip(deltas, norms, counted, strict=True):
        scale = limit / length if length > limit else 1.0
        # Not in one fused operation, whose rounding would depend on the processor.
        mean += delta * (scale * many / total)
    return mean, total


def norm(delta: torch.Tensor) -> float:
    """Euclidean. Raise `DeltaError` unless all values are finite."""
    length = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if not math.isfinite(length):
        raise DeltaError(
            "there are values that are not finite: training has diverged on this peer; lower its learning "
            "rate, clip its gradients"
        )
    return length


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0
