"""Which of several drafters is worth asking: how well each has agreed with the model lately."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import attrs

_MEMORY = 0.98
"""What a token counts for when another has been judged: the last 50 are what agreement is made of."""
_BELIEF = 8.0
"""Judged tokens for which what a drafter says of itself still counts as much as they do."""
_BUCKETS = 5
_PROBE_SOON = 16
_PROBE_LATE = 512
"""Rounds after which a drafter that is not worth it is asked all the same, at first and in the end."""
_USUAL = 0.7
"""How likely a token is taken to be right of whose drafter nothing is known."""


@attrs.define
class _Judged:
    right: float = 0.0
    all: float = 0.0

    def note(self, right: bool) -> None:
        self.right = self.right * _MEMORY + right
        self.all = self.all * _MEMORY + 1

    def share(self, belief: float) -> float:
        return (self.right + _BELIEF * belief) / (self.all + _BELIEF)


@attrs.define
class Agreement:
    """How one drafter has agreed with the model lately."""

    proposed: int = 0
    """Tokens that were judged, since the beginning: those after a wrong one are not."""
    accepted: int = 0
    """Of these the ones that were right."""
    seconds: float = 0.0
    """What a proposed token takes to make."""
    length: float = 0.0
    """Tokens of a proposal, when more were asked for."""
    answers: _Judged = attrs.field(factory=_Judged)
    """Whether it proposes something when it is asked."""
    tokens: _Judged = attrs.field(factory=_Judged)
    by_probability: list[_Judged] = attrs.field(factory=lambda: [_Judged() for _ in range(_BUCKETS)])
    """The same of tokens that it said were likely to this or that degree."""

    @property
    def rate(self) -> float:
        """How likely a token of it is right."""
        return self.tokens.share(_USUAL)

    def likely(self, stated: float) -> float:
        """How likely a token is right of which the drafter says that it is ``stated`` likely."""
        return self._bucket(stated).share(stated)

    def note(self, right: bool, stated: float | None) -> None:
        self.proposed += 1
        self.accepted += right
        self.tokens.note(right)
        if stated is not None:
            self._bucket(stated).note(right)

    def _bucket(self, stated: float) -> _Judged:
        return self.by_probability[min(int(stated * _BUCKETS), _BUCKETS - 1)]


class DrafterPool:
    """Chooses among drafters, by their names, for all sequences of a model. A plain object.

    What it weighs is tokens for a second: those of a step, which are one more than the drafts that are right,
    over the time of the step and of drafting.
    """

    def __init__(self, step_seconds: float = 0.1) -> None:
        self.step_seconds = step_seconds
        """What a step takes at present; to be kept up by whoever measures it."""
        self._agreement: dict[str, Agreement] = {}
        self._passed_over: Counter[str] = Counter()
        self._probe_after: dict[str, int] = {}

    def __repr__(self) -> str:
        rates = ", ".join(f"{name} {each.rate:.2f}" for name, each in self._agreement.items())
        return f"<DrafterPool {rates or 'nothing judged'}>"

    def agreement(self, drafter: str) -> Agreement:
        """What is known of a drafter."""
        return self._agreement.setdefault(drafter, Agreement())

    def agreed(self, drafter: str, proposed: int, accepted: int, stated: Sequence[float] = ()) -> None:
        """The first ``accepted`` of ``proposed`` tokens were right, which were to be ``stated`` likely."""
        agreement = self.agreement(drafter)
        for place in range(min(accepted + 1, proposed)):
            agreement.note(place < accepted, stated[place] if stated else None)

    def answered(
        self, drafter: str, asked: int, proposed: int, seconds: float, *, steady: bool = True
    ) -> None:
        """A drafter that was asked for so many tokens proposed so many, which took so long.

        Without ``steady`` it may have had to catch up with the text first, which it need not every time.
        """
        agreement = self.agreement(drafter)
        agreement.answers.note(proposed > 0)
        if not proposed:
            return
        share = 0.2 if agreement.length else 1.0
        length = proposed if proposed < asked else max(proposed, agreement.length)
        agreement.length += share * (length - agreement.length)
        cost = seconds / proposed
        if steady or cost < agreement.seconds:
            agreement.seconds += (0.2 if agreement.seconds else 1.0) * (cost - agreement.seconds)

    def likely(self, drafter: str, count: int, stated: Sequence[float] = ()) -> list[float]:
        """How likely each of ``count`` proposed tokens is when those before it are right."""
        agreement = self.agreement(drafter)
        return [agreement.likely(each) for each in stated] or [agreement.rate] * count

    def value(self, likely: Sequence[float], seconds: float = 0.0) -> float:
        """Tokens for a second of a step with drafts that are so likely and take so long to make."""
        drafts: float = sum(accumulate(likely, mul))
        return (1 + drafts) / (self.step_seconds + seconds)

    def worth_asking(self, drafter: str, k: int, best: float) -> int:
        """For how many tokens it should be asked, ``k`` at most, to be worth more than ``best``; 0 for none.

        Now and then it is asked if not: twice as seldom each time, until what it proposes is `chosen`.
        """
        agreement = self.agreement(drafter)
        found = agreement.answers.share(1.0)
        length, value = 1, 0.0
        for count in range(1, k + 1):
            made = min(count, agreement.length or count)
            drafts = found * sum(agreement.rate ** (place + 1) for place in range(round(made)))
            rate = (1 + drafts) / (self.step_seconds + found * agreement.seconds * made)
            if rate > value:
                length, value = count, rate
        if value > best:
            return length
        after = self._probe_after.get(drafter, _PROBE_SOON)
        self._passed_over[drafter] += 1
        if self._passed_over[drafter] < after:
            return 0
        self._passed_over[drafter] = 0
        self._probe_after[drafter] = min(2 * after, _PROBE_LATE)
        return length

    def chosen(self, drafter: str) -> None:
        """What it proposed is being verified; or there is another text, and so another chance."""
        self._passed_over.pop(drafter, None)
        self._probe_after.pop(drafter, None)
