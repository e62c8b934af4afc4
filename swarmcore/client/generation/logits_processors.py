"""Some of transformers' logits processors, doing the same for one sequence in a small part of the time.

Theirs look at the whole vocabulary where a few tokens matter: sorting it takes longer than all else that a
client does for a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TopPLogitsWarper,
)

CANDIDATES = 1024
"""Most of the likeliest tokens among which the nucleus is looked for before all are sorted."""

CLOSE = 1e-5
"""Where a sum of probabilities is so close to the limit, the order of summation may decide."""


def faster(processors: Iterable[Any], *, exact: bool = True) -> LogitsProcessorList:
    """The same processors, those of transformers that there is a faster one of replaced by that.

    Without ``exact`` another one of equally likely tokens may be the last that is kept.
    """
    return LogitsProcessorList([_faster(processor, exact) for processor in processors])


def _faster(processor: Any, exact: bool) -> Any:
    kind = type(processor)  # what is built on one of them may do anything
    if kind is MinLengthLogitsProcessor:
        return _EndNotBefore(processor.min_length, processor.eos_token_id)
    if kind is MinNewTokensLengthLogitsProcessor:
        length = processor.prompt_length_to_skip + processor.min_new_tokens
        return _EndNotBefore(length, processor.eos_token_id)
    return _Nucleus(processor, exact) if kind is TopPLogitsWarper else processor


class _EndNotBefore(LogitsProcessor):  # type: ignore[misc]
    """Forbids tokens that end the text as long as that is short; overwrites the scores."""

    def __init__(self, length: int, ends: torch.Tensor) -> None:
        self._length, self._ends = length, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] < self._length:
            ends = self._ends[self._ends < scores.shape[-1]]
            scores[:, ends] = -math.inf
        return scores


class _Nucleus(LogitsProcessor):  # type: ignore[misc]
    """Keeps the fewest tokens whose probabilities add up to ``top_p``."""

    def __init__(self, warper: Any, exact: bool) -> None:
        self._warper, self._exact = warper, exact

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[0] == 1 and (kept := self._kept(scores[0])) is not None:
            filtered = torch.full_like(scores, self._warper.filter_value)
            filtered[0, kept] = scores[0, kept]
            return filtered
        return cast(torch.Tensor, self._warper(input_ids, scores))

    def _kept(self, scores: torch.Tensor) -> torch.Tensor | None:
        """The tokens that are kept; None where looking at the likeliest ones does not tell."""
        limit = 1 - self._warper.top_p
        least = scores.topk(min(CANDIDATES, len(scores))).values[-1]
        likely = ((scores >= least) & (scores > -math.inf)).nonzero()[:, 0]
        probabilities = torch.softmax(scores, -1)
        ordered, order = torch.sort(scores[likely])
        below = probabilities.sum() - probabilities[likely].sum()
        sums = below + probabilities[likely[order]].cumsum(0)
        most_kept = len(ordered) - self._warper.min_tokens_to_keep
        if not math.isfinite(below):
            return None
        if most_kept < 0 or bool(below > limit - CLOSE) or bool(((sums - limit).abs() < CLOSE).any()):
            return None
        removed = min(int((sums <= limit).sum()), most_kept)
        if self._exact and removed and ordered[removed - 1] == ordered[removed]:
            return None  # which of equals are kept depends on how all are sorted
        return likely[order[removed:]]
