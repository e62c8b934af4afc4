"""Where the end of a text has occurred before: n-grams of a growing text, in chains as in deflate."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import attrs
import numpy as np

MAX_MATCH = 32
"""Tokens that are compared; a longer match says nothing more."""
_LONG = 8
"""Of a common short n-gram only the latest occurrences are looked at; long ones have a chain of their own."""
_MAX_CANDIDATES = 48
_ENOUGH = 8
"""Occurrences of `MAX_MATCH` tokens after which no others are looked for."""
_FIRST_CAPACITY = 256
MAX_TOKENS = 2**18
"""Of one text; beyond that its older half is forgotten."""
BYTES_PER_TOKEN = 4 + 2 * (4 + 4)
"""The text, and for each of two lengths of n-gram a bucket and a link."""

_MULTIPLIER = 0x9E3779B97F4A7C15
_SPREAD = 0xD6E8FEB86659FD93
_WORD = 2**64 - 1

BREAK = -1
"""Between two texts: no token, so that no match goes beyond it."""


@attrs.frozen
class Match:
    """The longest end of a text that was found."""

    length: int
    """Of its tokens, `MAX_MATCH` at most."""
    ends: Sequence[int] = ()
    """The positions behind its occurrences, the latest first; not all of them where there are many."""


class _Chains:
    """The n-grams of a text by their hash: each knows the one before it in the same bucket."""

    def __init__(self, n: int, capacity: int) -> None:
        self.n = n
        self._shift = 64 - (capacity.bit_length() - 1)
        self._heads = array("i", bytes(4 * capacity))
        self._before = array("i", bytes(4 * (capacity + 1)))

    def add(self, text: array[int]) -> None:
        """Add the n-gram at the end of ``text``."""
        end = len(text)
        if end >= self.n:
            bucket = self._bucket(text[end - self.n :])
            self._before[end] = self._heads[bucket]
            self._heads[bucket] = end

    def add_many(self, text: array[int], first: int) -> None:
        """Add those that end behind position ``first`` or later."""
        first = max(first, self.n - 1)
        count = len(text) - first
        if count <= 0:
            return
        ids = np.frombuffer(text, np.int32)[first + 1 - self.n :].astype(np.uint64)
        hashes = np.zeros(count, np.uint64)
        for i in range(self.n):
            hashes = hashes * np.uint64(_MULTIPLIER) + ids[i : i + count]
        buckets = (hashes * np.uint64(_SPREAD)) >> np.uint64(self._shift)
        order = np.argsort(buckets, kind="stable")
        ends = (order + (first + 1)).astype(np.int32)
        sorted_buckets = buckets[order]
        begins = np.ones(count, bool)
        begins[1:] = sorted_buckets[1:] != sorted_buckets[:-1]
        heads, before = np.frombuffer(self._heads, np.int32), np.frombuffer(self._before, np.int32)
        links = np.empty_like(ends)
        links[1:] = ends[:-1]
        links[begins] = heads[sorted_buckets[begins]]
        before[ends] = links
        last = np.append(begins[1:], True)
        heads[sorted_buckets[last]] = ends[last]

    def ends(self, tail: Sequence[int]) -> list[int]:
        """The positions behind what may be occurrences of the last n tokens of ``tail``, the latest first."""
        found: list[int] = []
        end = self._heads[self._bucket(tail[-self.n :])] if len(tail) >= self.n else 0
        while end and len(found) < _MAX_CANDIDATES:
            found.append(end)
            end = self._before[end]
        return found

    def _bucket(self, ngram: Sequence[int]) -> int:
        value = 0
        for token in ngram:
            value = value * _MULTIPLIER + token & _WORD
        return (value * _SPREAD & _WORD) >> self._shift


class Room(Protocol):
    """Who counts the memory of an index."""

    def take(self, size: int) -> bool:
        """Hold so many bytes more, or say that there is no room."""

    def give_back(self, size: int) -> None:
        """Hold so many bytes less."""


class SuffixIndex:
    """A text that grows, and in which the longest end of a text is found in microseconds.

    It takes `BYTES_PER_TOKEN` for each token of its capacity, which is a power of two. Where there is no more
    room the older half of the text is forgotten.
    """

    def __init__(self, min_match: int, room: Room) -> None:
        """Matches are of ``min_match`` tokens or more."""
        self._min_match = min_match
        self._room = room
        self._capacity = 0
        self.text: array[int] = array("i")
        self._chains: list[_Chains] = []

    def __len__(self) -> int:
        return len(self.text)

    @property
    def nbytes(self) -> int:
        """Bytes that have been taken."""
        return self._capacity * BYTES_PER_TOKEN

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with ``tokens``. Of more than there is room for, the last ones are kept."""
        if len(self.text) + len(tokens) > self._capacity:
            self._make_room(tokens)
        elif len(tokens) > 32:
            first = len(self.text)
            self.text.extend(tokens)
            for chains in self._chains:
                chains.add_many(self.text, first)
        else:
            for token in tokens:
                self.text.append(token)
                for chains in self._chains:
                    chains.add(self.text)

    def find(self, tail: Sequence[int], *, own_end: bool = False) -> Match:
        """The longest end of ``tail`` that occurs in the text.

        With ``own_end`` the tail is the end of the text, and is not found at its own place.
        """
        for chains in reversed(self._chains):
            best, ends = 0, list[int]()
            for end in chains.ends(tail):
                if own_end and end == len(self.text):
                    continue
                length = self._common(tail, end)
                if length > best:
                    best, ends = length, [end]
                elif length == best:
                    ends.append(end)
                    if length == MAX_MATCH and len(ends) == _ENOUGH:
                        break
            if best >= chains.n:
                return Match(best, ends)
        return Match(0)

    def close(self) -> None:
        """Forget the text and give back its memory. Harmless when repeated; it can be filled again."""
        self._room.give_back(self.nbytes)
        self._capacity = 0
        self.text = array("i")
        self._chains = []

    def _common(self, tail: Sequence[int], end: int) -> int:
        text, length = self.text, 0
        most = min(end, len(tail), MAX_MATCH)
        while length < most and text[end - 1 - length] == tail[-1 - length]:
            length += 1
        return length

    def _make_room(self, tokens: Sequence[int]) -> None:
        wanted = len(self.text) + len(tokens)
        capacity = max(self._capacity, _FIRST_CAPACITY)
        while capacity < min(wanted, MAX_TOKENS):
            capacity *= 2
        while capacity > self._capacity and not self._room.take(
            (capacity - self._capacity) * BYTES_PER_TOKEN
        ):
            capacity //= 2
        self._capacity = max(self._capacity, capacity if capacity >= _FIRST_CAPACITY else 0)
        text = self.text + array("i", tokens)
        self.text = text if wanted <= self._capacity else text[wanted - self._capacity // 2 :]
        self._chains = [_Chains(n, self._capacity) for n in (self._min_match, _LONG) if self._capacity]
        for chains in self._chains:
            chains.add_many(self.text, 0)
