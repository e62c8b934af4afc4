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
