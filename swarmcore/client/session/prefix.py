"""What a session's sequences begin with, as servers know it: by names of pages."""

from __future__ import annotations

from collections.abc import Sequence

from swarmcore.routing.chain import Chain
from swarmcore.wire.prefix_names import (
    MAX_SESSION_NAMES,
    NAME_BYTES,
    NAMED_TOKENS,
    prefix_names,
    prefix_root,
)
from swarmcore.wire.tensors import Tensor, joined


def chain_numerics(chain: Chain) -> str:
    """How the servers of a chain compute: what they keep depends on those before them."""
    if len(chain.numerics) == 1:
        return str(chain.numerics[0])
    return " ".join(f"{stage.server.computes} {stage.span}" for stage in chain.stages)


class SessionPrefix:
    """The tokens of a session's sequences, as far as they are known, and the names of their pages.

    What one server keeps depends on how those before it compute: pages have other names on a chain that
    computes in another way.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], *parts: str) -> None:
        """``parts`` are what the values depend on besides: the model's fingerprint, an adapter, a codec."""
        self.tokens = [tuple(each) for each in tokens]
        self._parts = parts
        self._numerics: str | None = None
        self._mixed = False

    def opened_on(self, chain: Chain) -> None:
        """The whole session has been opened on ``chain``."""
        self._numerics = chain_numerics(chain)

    def replaced_by(self, part: Chain) -> None:
        """A part of the session's chain is another one now."""
        self._mixed = self._mixed or chain_numerics(part) != self._numerics

    def skipped(self, sequence: int, cached: int, length: int) -> int:
        """How many of a sequence's first ``length`` rows, of which ``cached`` are there, are not computed.

        The last one is.
        """
        named = len(self.tokens[sequence]) // NAMED_TOKENS * NAMED_TOKENS
        return max(0, min(cached, named, length - 1))

    def grown(self, tokens: Sequence[Sequence[int]]) -> bool:
        """Take note of the sequences' tokens by now; whether there are whole pages more, or other ones."""
        pages = [len(each) // NAMED_TOKENS * NAMED_TOKENS for each in tokens]
        before = self.tokens
        self.tokens = [tuple(each) for each in tokens]
        return any(
            tuple(each[:end]) != old[:end] for each, old, end in zip(tokens, before, pages, strict=True)
        )

    def names(self, chain: Chain | None = None) -> tuple[bytes, ...]:
        """What the pages of each sequence are called on the session's chain, or on ``chain`` as a part of it.

        As many as a message may hold. None where that computes in another way than the rest.
        """
        numerics = self._numerics if chain is None else chain_numerics(chain)
        if self._mixed or numerics is None or self._numerics not in (None, numerics):
            return ()
        return self.names_on(numerics)

    def names_on(self, numerics: str) -> tuple[bytes, ...]:
        """What they are called on chains of these numerics; for none, what this client remembers them by."""
        root, most = prefix_root(*self._parts, numerics), MAX_SESSION_NAMES // max(1, len(self.tokens))
        return tuple(prefix_names(each, root)[: most * NAME_BYTES] for each in self.tokens)


def parted(hidden: Tensor, lengths: Sequence[int], first: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ``first`` so many of each sequence's rows, and the others."""
    ones, others, row = [], [], 0
    for count, length in zip(first, lengths, strict=True):
        ones.append(hidden.rows(row, row + count))
        others.append(hidden.rows(row + count, row + length))
        row += length
    return joined(ones), joined(others)
