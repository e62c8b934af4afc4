"""How much of the attention cache each caller holds, and what an equal share would be. A plain object."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable


class CacheShares:
    """Pages held by each caller: whoever sessions are for, such as a peer.

    Shares matter only while callers contend: while one waits, and another one holds something.
    """

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._held: Counter[str] = Counter()
        self._share = float(pages)
        self.contended = False
        """Whether more than one caller holds something or waits."""

    def add(self, caller: str, pages: int) -> None:
        """A caller holds so many more, or fewer."""
        self._held[caller] += pages
        if not self._held[caller]:
            del self._held[caller]

    def weigh(self, waiting: Iterable[str]) -> None:
        """Work out the share anew, when these callers wait."""
        callers = {*self._held, *waiting}
        self.contended = len(callers) > 1
        self._share = self._pages / max(1, len(callers))

    def held(self, caller: str) -> int:
        return self._held[caller]

    def within(self, caller: str, extra: int) -> bool:
        """Whether the caller would hold no more than its share with ``extra`` pages."""
        return self._held[caller] + extra <= self._share

    def surplus(self, caller: str) -> int:
        """Pages that the caller holds above its share."""
        return max(0, math.ceil(self._held[caller] - self._share))
