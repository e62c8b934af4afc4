"""Whether this peer can be reached from outside, from what other peers say who tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from multiaddr import Multiaddr

from swarmcore.types import PeerId

ASK_AGAIN_SECONDS = 600.0
"""How long an answer stands before its peer, or another one, is asked again."""

EXPIRY_SECONDS = 2 * ASK_AGAIN_SECONDS
"""How long an answer counts when nobody can be asked again."""

SILENCE_SECONDS = 1800.0
"""How long a peer that did not answer is left alone."""

ANSWERS_WANTED = 3
"""As many peers are asked as needed to have this many answers."""


@attrs.frozen
class Answer:
    """What one peer found: the addresses it tried, and those at which it reached this peer."""

    tried: frozenset[Multiaddr]
    reached: frozenset[Multiaddr]
    at: float


class Reachability:
    """A plain object: answers of peers in, the verdict and whom to ask next out. ``now`` is in seconds."""

    def __init__(self) -> None:
        self._answers: dict[PeerId, Answer] = {}
        self._unanswered: dict[PeerId, float] = {}

    def __repr__(self) -> str:
        tried = {address for answer in self._answers.values() for address in answer.tried}
        return f"<Reachability {len(self._answers)} answers about {len(tried)} addresses>"

    def answered(
        self, by: PeerId, tried: Iterable[Multiaddr], reached: Iterable[Multiaddr], now: float
    ) -> None:
        """``by`` has tried addresses, and reached some of them; this replaces what it said before."""
        self._unanswered.pop(by, None)
        tried = frozenset(tried)
        self._answers[by] = Answer(tried, tried & frozenset(reached), now)

    def no_answer(self, by: PeerId, now: float) -> None:
        """``by`` was asked and gave no answer; what it said before still counts."""
        self._unanswered[by] = now

    def clear(self) -> None:
        """Own addresses have changed: no answer stands any longer."""
        self._answers.clear()
        self._unanswered.clear()

    def to_ask(self, connected: Sequence[PeerId], now: float) -> list[PeerId]:
        """Which of ``connected`` to ask now; those that have never answered come first."""
        self._drop_old(now)
        fresh = [by for by, answer in self._answers.items() if now - answer.at < ASK_AGAIN_SECONDS]
        free = [by for by in connected if by not in fresh and by not in self._unanswered]
        free.sort(key=lambda by: by in self._answers)
        return free[: max(0, ANSWERS_WANTED - len(fresh))]

    def verified(self, now: float) -> list[Multiaddr]:
        """The addresses at which at least as many peers reached this one as failed to."""
        self._drop_old(now)
        votes: dict[Multiaddr, int] = {}
        for answer in self._answers.values():
            for address in answer.tried:
                votes[address] = votes.get(address, 0) + (1 if address in answer.reached else -1)
        reached = {address for answer in self._answers.values() for address in answer.reached}
        return sorted((address for address in reached if votes[address] >= 0), key=str)

    def is_reachable(self, now: float) -> bool | None:
        """Whether peers outside reach this one; None as long as none has tried."""
        verified = self.verified(now)
        return bool(verified) if self._answers else None

    def next_change_at(self, now: float) -> float:
        """When `to_ask` or `verified` will change by the passing of time alone."""
        moments = [answer.at + EXPIRY_SECONDS for answer in self._answers.values()]
        moments += [answer.at + ASK_AGAIN_SECONDS for answer in self._answers.values()]
        moments += [at + SILENCE_SECONDS for at in self._unanswered.values()]
        return min((moment for moment in moments if moment > now), default=float("inf"))

    def _drop_old(self, now: float) -> None:
        self._answers = {by: a for by, a in self._answers.items() if now - a.at < EXPIRY_SECONDS}
        self._unanswered = {by: at for by, at in self._unanswered.items() if now - at < SILENCE_SECONDS}
