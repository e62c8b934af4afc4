"""A server's memory of a session's steps, so that a repeated step is answered and not computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import attrs

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.wire.messages import Step

Answer = TypeVar("Answer")


@attrs.define
class _Seen(Generic[Answer]):
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    answer: Answer | None
    """None when it had to make room."""
    attempt: int


class DedupCache(Generic[Answer]):
    """Remembers the answers of the latest ``depth`` steps; what an answer is, is the caller's business."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._seen: dict[int, _Seen[Answer]] = {}
        self._latest = -1
        self._forgotten = -1

    def __len__(self) -> int:
        """Answers that are remembered."""
        return len(self._seen)

    def outdated(self, step: Step) -> bool:
        """Whether the client has sent this step again since, or is done with it: nobody waits for it."""
        seen = self._seen.get(step.step)
        return step.step <= self._latest if seen is None else step.attempt < seen.attempt

    def repeated(self, step: Step) -> Answer | None:
        """The answer of this step if it came before, else None.

        Raise `InvalidStepError` when its number was used for other tokens, or is too old to be remembered,
        `SessionLostError` when its answer was dropped.
        """
        seen = self._seen.get(step.step)
        if seen is None:
            if step.step <= self._latest:
                raise InvalidStepError(
                    f"step {step.step} came after step {self._latest} and is no longer remembered; "
                    f"send its tokens as a new step"
                )
            return None
        if (seen.starts, seen.lengths, seen.sources) != (step.starts, step.lengths, step.sources):
            raise InvalidStepError(
                f"step {step.step} came again with other positions: {step.starts} + {step.lengths} "
                f"after {seen.starts} + {seen.lengths}"
            )
        if seen.answer is None:
            raise SessionLostError(
                f"the answer to step {step.step} had to make room here, and its tokens cannot be computed "
                f"twice; replay the session"
            )
        seen.attempt = max(seen.attempt, step.attempt)
        return seen.answer

    @property
    def answers(self) -> list[Answer]:
        """The answers that are remembered."""
        return [seen.answer for seen in self._seen.values() if seen.answer is not None]

    def drop_answers(self, which: Callable[[Answer], bool]) -> None:
        """Forget some answers; that their steps came is still known."""
        for seen in self._seen.values():
            if seen.answer is not None and which(seen.answer):
                seen.answer = None

    def remember(self, step: Step, answer: Answer) -> None:
        """Keep the answer of a new step; forget those that are settled, and the oldest one past the depth."""
        self._seen[step.step] = _Seen(step.starts, step.lengths, step.sources, answer, step.attempt)
        self._latest = max(self._latest, step.step)
        for number in [number for number in self._seen if number < step.settled]:
            self._drop(number)
        if len(self._seen) > self._depth:
            self._drop(min(self._seen))

    def forget(self, step: Step) -> None:
        """The step failed: it may be sent again under its number."""
        self._seen.pop(step.step, None)
        self._latest = max(self._seen, default=self._forgotten)

    def _drop(self, number: int) -> None:
        del self._seen[number]
        self._forgotten = max(self._forgotten, number)
