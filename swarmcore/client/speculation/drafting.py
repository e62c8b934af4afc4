"""Drafts for one sequence, of whichever drafter is likely to be right."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.client.speculation.guarded import NOTHING, WAIT, GuardedDrafter, Proposal
from swarmcore.client.speculation.pool import DrafterPool

if TYPE_CHECKING:
    import torch

_MOST_OPEN = 64
"""Proposals that are yet to be judged."""
_STEADY = 16
"""Tokens since a drafter was last asked after which it has to catch up before it can answer."""


@attrs.define
class _Open:
    """A proposal that the text has not gone past."""

    proposal: Proposal
    before: int
    """Tokens of the text that come before it, and have to be as they were expected."""
    expected: Sequence[int]
    """Those, and the proposal's."""
    seen: int = 0


class Drafting:
    """Proposals for one sequence out of several drafters, each judged by how the text went on.

    Also those that are not used: which is how a drafter that was not chosen becomes the one that is.
    """

    def __init__(self, drafters: Sequence[GuardedDrafter], pool: DrafterPool) -> None:
        # Those that cost next to nothing are asked first.
        self._drafters = sorted(drafters, key=lambda drafter: drafter.source.threaded)
        self._pool = pool
        for drafter in drafters:
            pool.chosen(drafter.name)
        self._length = 0
        self._asked_at: dict[str, int] = {}
        self._open: deque[_Open] = deque(maxlen=_MOST_OPEN)
        self._meanwhile: list[list[int]] = []
        """For each proposal that is waited for, how the text has gone on since."""

    def __repr__(self) -> str:
        names = ", ".join(drafter.name for drafter in self._drafters if not drafter.set_aside)
        return f"<Drafting {names or 'nothing'}>"

    @property
    def wants_hidden(self) -> bool:
        """Whether a drafter has use for `observe`."""
        return any(each.source.wants_hidden and not each.set_aside for each in self._drafters)

    def append(self, tokens: Sequence[int]) -> None:
        """The text, which is certain, goes on with these tokens; the first ones are the prompt."""
        for drafter in self._drafters:
            drafter.append(tokens)
        self._length += len(tokens)
        for meanwhile in self._meanwhile:
            meanwhile.extend(tokens)
        if self._open:
            self._open = deque((each for each in self._open if self._goes_on(each, tokens)), _MOST_OPEN)

    def observe(self, start: int, hidden: torch.Tensor) -> None:
        """As `Drafter.observe`."""
        for drafter in self._drafters:
            drafter.observe(start, hidden)

    async def propose(self, ahead: Sequence[int], k: int, *, wait: float = WAIT) -> Proposal:
        """At most ``k`` tokens that may come after the text and then ``ahead``, which is being verified.

        With each comes how likely it is, by what its drafter says and how that came true lately. Nothing
        where there is no guess. Slow drafters are waited for, ``wait`` seconds each.
        """
        best, value = NOTHING, self._pool.value(())
        for drafter in self._drafters:
            if drafter.set_aside:
                continue
            wanted = k
            if drafter.source.threaded:
                wanted = self._pool.worth_asking(drafter.name, k, value)
            if not wanted:
                continue
            proposal = await self._ask(drafter, ahead, wanted, wait)
            if not proposal.tokens:
                continue
            likely = self._pool.likely(drafter.name, len(proposal.tokens), proposal.probabilities)
            # What was spent on it is spent: it is compared by what it is worth from here on.
            if (found := self._pool.value(likely)) > value:
                best, value = attrs.evolve(proposal, probabilities=tuple(likely)), found
        if best.tokens:
            self._pool.chosen(best.drafter)
        return best

    def close(self, counts: SpeculationCounts | None = None) -> None:
        """Let go of what is kept for the sequence, and note in ``counts`` what went wrong. Harmless when
        repeated."""
        for drafter in self._drafters:
            if counts is not None and drafter.failure:
                counts.set_aside[drafter.name] = drafter.failure
            if counts is not None and drafter.late:
                counts.late[drafter.name] += drafter.late
            drafter.close()

    async def _ask(self, drafter: GuardedDrafter, ahead: Sequence[int], k: int, wait: float) -> Proposal:
        meanwhile = list[int]()
        self._meanwhile.append(meanwhile)
        try:
            proposal = await drafter.propose(ahead, k, wait)
        finally:
            self._meanwhile = [other for other in self._meanwhile if other is not meanwhile]
        steady = self._length - self._asked_at.get(drafter.name, -_STEADY) < _STEADY
        self._asked_at[drafter.name] = self._length
        self._pool.answered(drafter.name, k, len(proposal.tokens), proposal.seconds, steady=steady)
        if proposal.tokens:
            each = _Open(proposal, len(ahead), [*ahead, *proposal.tokens])
            if self._goes_on(each, meanwhile):
                self._open.append(each)
        return proposal

    def _goes_on(self, each: _Open, tokens: Sequence[int]) -> bool:
        """Judge a proposal by the next tokens of the text; whether it is still open after that."""
        count = len(each.proposal.tokens)
        for token in tokens:
            right = token == each.expected[each.seen]
            each.seen += 1
            accepted = each.seen - each.before - (not right)
            if accepted < 0 and not right:
                return False  # what it was made for did not come about
            if not right or accepted == count:
                self._pool.agreed(each.proposal.drafter, count, accepted, each.proposal.probabilities)
                return False
        return True
