"""The seam between whatever guesses the next tokens and the generation that has them verified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch

STOP_BELOW = 0.3
"""A proposal of a model ends with the token up to which it is less likely than this to be right."""


class Drafter(ABC):
    """Guesses how one sequence goes on. What it proposes costs time when it is wrong, never a wrong token.

    Its text is what has been `append`\\ ed, and never becomes shorter. Methods are called one at a time; with
    `threaded`, all from one thread that is not the event loop's.
    """

    name: str
    """What is shown of it: ``"suffix"``, ``"model"``, ``"heads"``."""
    threaded: bool = True
    """Whether a call may take longer than an event loop can wait, which is some 100 microseconds."""
    wants_hidden: bool = False
    """Whether it is of use only with the rows that `observe` brings."""
    probabilities: Sequence[float] = ()
    """How likely each token of the latest proposal is, if the drafter knows; empty if not."""

    @abstractmethod
    def append(self, tokens: Sequence[int]) -> None:
        """The text, which is certain, goes on with these tokens; the first ones are the prompt."""

    @abstractmethod
    def propose(self, ahead: Sequence[int], k: int) -> list[int]:
        """At most ``k`` tokens that may come after the text and then ``ahead``; none for no guess.

        ``ahead`` is drafted and being verified: it may come to nothing, and the drafter may not keep it.
        """

    def observe(self, start: int, hidden: torch.Tensor) -> None:  # noqa: B027  (most have no use for it)
        """What the last block made of the tokens from position ``start`` on: ``[tokens, hidden size]``.

        Before the final norm, and of tokens that have been appended. Rows may be missing, as where servers
        had the beginning of the prompt in their caches; none comes twice.
        """

    def close(self) -> None:  # noqa: B027  (most keep nothing)
        """Let go of what is kept for this sequence. Harmless when repeated."""


@attrs.frozen(eq=False)
class DraftRequest:
    """A call of `Drafter.propose` that is yet to be made."""

    drafter: Drafter
    ahead: Sequence[int]
    k: int
    wanted: Callable[[], bool] = lambda: True
    """Whether it still is: one that takes long may be ended by then with what there is."""


class DraftSource(ABC):
    """Makes the drafters of a model's sequences, and keeps what they share: weights, earlier texts."""

    name: str
    """The name of its drafters."""
    threaded: bool = True
    """As of its drafters."""
    wants_hidden: bool = False
    """As of its drafters."""

    @abstractmethod
    def drafter(self, *, owner: str = "") -> Drafter:
        """One for a new sequence, which may draw on earlier texts of the same ``owner`` and of no other."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Proposals of several of its drafters, in their order; those that can share a pass do."""
        return [
            request.drafter.propose(request.ahead, request.k) if request.wanted() else []
            for request in requests
        ]

    def close(self) -> None:  # noqa: B027  (most keep nothing)
        """Let go of what its drafters share. Harmless when repeated."""
