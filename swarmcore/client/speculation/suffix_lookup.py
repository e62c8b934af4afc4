"""Drafts out of what was written before: how the text went on where its end stood earlier."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence

import attrs

from swarmcore.client.speculation.drafter import Drafter, DraftSource
from swarmcore.client.speculation.suffix_index import BREAK, MAX_MATCH, Match, SuffixIndex
from swarmcore.client.speculation.token_memory import TokenMemory, shared_memory
from swarmcore.errors import InputError

MIN_MATCH = 1
"""Tokens that must have occurred before."""
STOP_BELOW = 0.1
"""A proposal ends before the token up to which it is less likely than this to be right."""

_LENGTHS = (2, 4, 5, 10, 32)
_LIKELY = (0.25, 0.55, 0.75, 0.85, 0.93, 0.98)
"""How often a token is right when fewer than each of `_LENGTHS` before it are as they were earlier, and when
more are. Measured on edits, summaries and chat."""


class SuffixLookup(DraftSource):
    """Drafters that look up the longest end of their text in what came before it.

    That is the prompt, with the earlier turns in it, and what has been generated. With ``earlier_texts`` it
    is also what was generated before for the same owner.
    """

    name = "suffix"
    threaded = False

    def __init__(
        self,
        *,
        min_match: int = MIN_MATCH,
        earlier_texts: bool = False,
        memory: TokenMemory = shared_memory,
    ) -> None:
        if not 1 <= min_match <= 8:
            raise InputError(f"min_match must be 1 to 8 tokens; got {min_match}")
        self._min_match = min_match
        self._memory = memory
        self._keeps = earlier_texts
        self._earlier: OrderedDict[str, SuffixIndex] = OrderedDict()

    def drafter(self, *, owner: str = "") -> SuffixDrafter:
        if self._keeps:
            if owner not in self._earlier:
                self._earlier[owner] = self._index(owner)
            self._earlier.move_to_end(owner)
        return SuffixDrafter(self._index(owner), self._earlier.get(owner))

    def close(self) -> None:
        while self._earlier:
            self._forget()

    def take(self, owner: str, size: int) -> bool:
        """Hold memory for a text; earlier texts of other owners make way for it, the least used first."""
        while not self._memory.take(owner, size):
            if not self._earlier or next(iter(self._earlier)) == owner:
                return False
            self._forget()
        return True

    def _index(self, owner: str) -> SuffixIndex:
        return SuffixIndex(self._min_match, _Share(self, self._memory, owner))

    def _forget(self) -> None:
        self._earlier.popitem(last=False)[1].close()


@attrs.frozen
class _Share:
    """The memory of one owner's texts."""

    source: SuffixLookup
    memory: TokenMemory
    owner: str

    def take(self, size: int) -> bool:
        return self.source.take(self.owner, size)

    def give_back(self, size: int) -> None:
        self.memory.give_back(self.owner, size)


class SuffixDrafter(Drafter):
    """Made by `SuffixLookup.drafter`."""

    name = SuffixLookup.name
    threaded = False

    def __init__(self, index: SuffixIndex, earlier: SuffixIndex | None = None) -> None:
        self._index = index
        self._earlier = earlier
        self._generated: list[int] | None = None
        """What came after the prompt, and the prompt's end before it."""

    def append(self, tokens: Sequence[int]) -> None:
        self._index.append(tokens)
        if self._earlier is not None:
            if self._generated is None:
                self._generated = list(tokens[-MAX_MATCH:])
            else:
                self._generated.extend(tokens)

    def propose(self, ahead: Sequence[int], k: int) -> list[int]:
        tail = [*self._index.text[-MAX_MATCH:], *ahead]
        match, text = self._index.find(tail, own_end=not ahead), self._index.text
        if self._earlier is not None and match.length < MAX_MATCH:
            earlier = self._earlier.find(tail)
            if earlier.length > match.length:
                match, text = earlier, self._earlier.text
        tokens, self.probabilities = _continuation(match, text, ahead, k)
        return tokens

    def close(self) -> None:
        self._index.close()
        if self._earlier is not None and self._generated:
            self._earlier.append([*self._generated, BREAK])
            self._generated = None


def _continuation(
    match: Match, text: Sequence[int], ahead: Sequence[int], k: int
) -> tuple[list[int], list[float]]:
    """What came most often after the places of ``match``, then after those of them where it came, and so on.

    Of those that came equally often it is the latest. Behind the end of the text come ``ahead`` and what is
    found here, so that what repeats itself goes on. With each token comes how likely it is.
    """
    ends, behind, probabilities = match.ends, list(ahead), list[float]()
    together = 1.0
    for step in range(k):
        places = [end + step for end in ends]
        nexts = [text[place] if place < len(text) else behind[place - len(text)] for place in places]
        counts = Counter(token for token in nexts if token != BREAK)
        if not counts:
            break
        token, count = counts.most_common(1)[0]
        likely = _LIKELY[bisect_right(_LENGTHS, match.length + step)] * count / len(ends)
        together *= likely
        if together < STOP_BELOW:
            break
        behind.append(token)
        probabilities.append(likely)
        ends = [end for end, other in zip(ends, nexts, strict=True) if other == token]
    return behind[len(ahead) :], probabilities
