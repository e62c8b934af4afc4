"""Byte ranges: what is there, what is missing, and in which pieces to fetch it. Plain data, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""Bytes ``start`` to ``end``, the end excluded."""


def union(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The same bytes as few sorted ranges; two that are at most ``gap`` bytes apart become one."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def difference(wanted: Iterable[Range], have: Iterable[Range]) -> list[Range]:
    """The bytes of ``wanted`` that are not in ``have``."""
    there = union(have)
    missing: list[Range] = []
    at = 0
    for start, end in union(wanted):
        while at < len(there) and there[at][1] <= start:
            at += 1
        here = at
        while here < len(there) and there[here][0] < end:
            if start < there[here][0]:
                missing.append((start, there[here][0]))
            start = there[here][1]
            here += 1
        if start < end:
            missing.append((start, end))
    return missing


def pieces(ranges: Iterable[Range], most: int) -> Iterator[Range]:
    """The same bytes in ranges of at most ``most`` bytes."""
    for start, end in ranges:
        for at in range(start, end, most):
            yield at, min(at + most, end)


def length(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)
