"""How often each block of a model is served, and that as a bar of text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise

from swarmcore.types import Span

_LEVELS = "·▂▄▆█"
_ASCII_LEVELS = ".1234"


def coverage(spans: Iterable[Span], blocks: int) -> list[int]:
    """For each of ``blocks`` blocks the number of spans that hold it. What lies outside is ignored."""
    counts = [0] * blocks
    for span in spans:
        for block in range(span.start, min(span.end, blocks)):
            counts[block] += 1
    return counts


def uncovered(counts: Sequence[int]) -> list[Span]:
    """The ranges of blocks that nobody holds."""
    ranges: list[Span] = []
    for block, count in enumerate(counts):
        if count == 0:
            if ranges and ranges[-1].end == block:
                ranges[-1] = Span(ranges[-1].start, block + 1)
            else:
                ranges.append(Span(block, block + 1))
    return ranges


def coverage_bar(counts: Sequence[int], width: int, encoding: str | None = None) -> str:
    """``counts`` in at most ``width`` characters: · for 0, ▂ 1, ▄ 2, ▆ 3, █ for 4 and more.

    A character that stands for several blocks shows the one that is covered least. Where ``encoding``, by
    default that of stdout, lacks these characters they are ``.`` and the digits 1 to 4.
    """
    levels = _LEVELS
    try:
        levels.encode(encoding or sys.stdout.encoding)
    except UnicodeEncodeError:
        levels = _ASCII_LEVELS
    cells = min(width, len(counts))
    bounds = [cell * len(counts) // cells for cell in range(cells + 1)] if cells else [0]
    lowest = (min(counts[start:end]) for start, end in pairwise(bounds))
    return "".join(levels[min(count, len(levels) - 1)] for count in lowest)
