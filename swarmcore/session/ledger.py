"""A server's memory of a session's steps, so that a repeated step is answered and not computed again."""

from __future__ import annotations

from typing import Generic, TypeVar

import attrs

from swarmcore.errors import InvalidStepError
from swarmcore.wire.messages import Step

Answer = TypeVar("Answer")


@attrs.define
class _Seen(Generic[Answer]):
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    answer: Answer


class StepLedger(Generic[Answer]):
    """Remembers the answers of the latest ``depth`` steps; what an answer is, is the caller's business."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._seen: dict[int, _Seen[Answer]] = {}
        self._latest = -1

    def __len__(self) -> int:
        """Answers that are remembered."""
        return len(self._seen)

    def repeated(self, step: Step) -> Answer | None:
        """The answer of this step if it came before, else None.

        Raise `InvalidStepError` when its number was used for other tokens, or is too old to be remembered.
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
        return seen.answer

    def remember(self, step: Step, answer: Answer) -> None:
        """Keep the answer of a new step; forget those that are settled, and the oldest one past the depth."""
        self._seen[step.step] = _Seen(step.starts, step.lengths, step.sources, answer)
        self._latest = max(self._latest, step.step)
        for number in [number for number in self._seen if number < step.settled]:
            del self._seen[number]
        if len(self._seen) > self._depth:
            del self._seen[min(self._seen)]

    def forget(self, step: Step) -> None:
        """The step failed: it may be sent again under its number."""
        self._seen.pop(step.step, None)
        self._latest = max(self._seen, default=step.step - 1)
