"""Which chains have computed which beginnings of sequences of late, as one client remembers it."""

from __future__ import annotations

from collections.abc import Sequence

from swarmcore.routing.chain import Chain
from swarmcore.wire.prefix_names import NAME_BYTES, NAMED_TOKENS

MAX_NAMES = 16384
"""Pages that are remembered; those used longest ago are forgotten first."""


class PrefixMemory:
    """A plain object. Servers announce nothing of what they keep: this is a guess, which openings confirm."""

    def __init__(self) -> None:
        self._chains: dict[bytes, Chain] = {}

    def remember(self, names: Sequence[bytes], chain: Chain) -> None:
        """Pages of sequences, as in `swarmcore.wire.prefix_names`, have been computed by ``chain``."""
        for name in _pages(names):
            self._chains.pop(name, None)
            self._chains[name] = chain
        while len(self._chains) > MAX_NAMES:
            del self._chains[next(iter(self._chains))]

    def recall(self, names: Sequence[bytes]) -> tuple[Chain, int] | None:
        """The chain that has computed most of a sequence of these, and how many tokens of it."""
        best: tuple[Chain, int] | None = None
        for each in names:
            pages = _pages([each])
            for count in range(len(pages), 0 if best is None else best[1] // NAMED_TOKENS, -1):
                if (chain := self._chains.get(pages[count - 1])) is not None:
                    best = chain, count * NAMED_TOKENS
                    break
        return best

    def forget(self, names: Sequence[bytes]) -> None:
        """They are no longer there."""
        for name in _pages(names):
            self._chains.pop(name, None)

    def __len__(self) -> int:
        return len(self._chains)


def _pages(names: Sequence[bytes]) -> list[bytes]:
    return [each[at : at + NAME_BYTES] for each in names for at in range(0, len(each), NAME_BYTES)]
