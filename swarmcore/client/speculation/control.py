"""How many drafted tokens are worth verifying, and how many steps are worth having under way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import attrs

from swarmcore.client.speculation.pool import DrafterPool
from swarmcore.generation_settings import Speculation

MARGIN = 1.03
"""How many times the speed of plain decoding drafts must promise, as measurements are not exact."""
_MEMORY = 0.95
"""What a measured step counts for when another one has been measured."""
_GROWTH = 0.025
"""What a row is taken to add to the time of a step of one row, as long as nothing is measured."""
_DOUBT = 12.0
"""How much that counts for beside measurements: as much as a step of five rows beside one of one."""
_OUTLIER = 4.0
"""Steps that take so many times what is usual, such as in a failover, are taken for that at most."""
_HELD_UP = 1.1
"""The same of a step that was sent when others had been called back, which servers may still be at."""
_REMEMBERED = 2.0
"""What the measurements of an earlier generation count for, in steps."""
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Lengths of a chunk that are compared where several are to be under way."""
_MOST_LIKELY = 0.99
_NEARLY = 0.98
"""Of two lengths that are so close the longer one is taken: fewer steps cost the client less as well."""


@attrs.define
class StepTimes:
    """What a step takes by its rows, as was measured: ``first + growth * (rows - 1)`` seconds.

    Steps of one row say what the first takes, and longer ones what is added: whichever of the two has not
    been there for a while is what it was.
    """

    first: float = 0.0
    """Seconds of a step of one row; 0 as long as nothing was measured."""
    growth: float = 0.0
    """Seconds for each further row."""
    _weight: float = 0.0
    _rows_rows: float = 0.0
    _rows_seconds: float = 0.0
    _doubt: float = _DOUBT

    def measured(self, rows: int, seconds: float) -> None:
        more = rows - 1
        if self.first:  # rows cost no more than if they came one by one
            seconds = min(seconds, max(_OUTLIER * self.of(rows), rows * self.first))
        if not more or not self.first:
            self._weight = self._weight * _MEMORY + 1
            self.first += (seconds / (1 + _GROWTH * more) - self.first) / self._weight
        self.first = min(self.first, seconds)
        if more:
            self._rows_rows = self._rows_rows * _MEMORY + more * more
            self._rows_seconds = self._rows_seconds * _MEMORY + more * (seconds - self.first)
            self._doubt *= _MEMORY
        expected = self._doubt * _GROWTH * self.first
        self.growth = min((self._rows_seconds + expected) / (self._rows_rows + self._doubt), self.first)

    def remembered(self) -> StepTimes:
        """What is known, to be revised soon by a few steps."""
        share = min(1.0, _REMEMBERED / self._weight) if self._weight else 1.0
        sums = self._rows_rows, self._rows_seconds, self._doubt
        return StepTimes(self.first, self.growth, share * self._weight, *(share * each for each in sums))

    def of(self, rows: float) -> float:
        return self.first + self.growth * (rows - 1)


@attrs.frozen
class Plan:
    """What a round is to be: chunks of ``length`` drafted tokens, ``depth`` of them under way at a time."""

    length: int
    depth: int


class SpeculationController:
    """Decides, for one generation, what of the drafts is verified and how far ahead. A plain object.

    It weighs tokens a second: those that a step brings, for each of which all drafts before it have to be
    right, over what the step takes by its rows (`StepTimes`). Where generations share servers' batches, each
    row holds up all of them: rows are then counted as if everyone sent as many.
    """

    def __init__(
        self,
        settings: Speculation,
        pool: DrafterPool | None = None,
        *,
        stages: int = 1,
        before: SpeculationController | None = None,
    ) -> None:
        """``stages`` are the servers of the chain; the ``pool`` is told what a step takes. The one ``before``
        measured generations of the same model: where they went over as many servers, perhaps others, they say
        what a step takes until that is measured here."""
        self.settings = settings
        self._pool = pool
        self._stages = max(stages, 1)
        self.times = StepTimes()
        if before is not None and before._stages == self._stages:
            self.times = before.times.remembered()
        self.max_in_flight = 1
        """Steps that the session allows to be under way."""
        self.sharing = 1
        """Generations whose rows are in the same batches, as far as that is known."""
        self._usual = before.overlap if before is not None else 1 / (self._stages + 1)
        self._recalled = False
        """Whether steps were called back since one was last measured."""
        self._interval = 0.0
        """Seconds after which a chunk comes back that was sent right behind another: the slowest stage's."""

    def __repr__(self) -> str:
        return (
            f"<SpeculationController {self.times.first * 1e3:.1f} ms + {self.times.growth * 1e3:.2f} a row>"
        )

    @property
    def ready(self) -> bool:
        """Whether it knows enough to want drafts."""
        return self.times.first > 0

    @property
    def max_depth(self) -> int:
        return min(self.max_in_flight, self.settings.max_depth)

    @property
    def interval(self) -> float:
        """Seconds for which a chunk of one row keeps the slowest stage, as far as that is known."""
        return min(self._interval or self.times.first * self._usual, self.times.first)

    @property
    def overlap(self) -> float:
        """For which share of a step the slowest stage is busy with it, as far as that is known."""
        return self._interval / self.times.first if self._interval else self._usual

    @property
    def growth(self) -> float:
        """Seconds that each further row adds to a step."""
        return self.times.growth * self.sharing

    def measured(self, rows: int, seconds: float) -> None:
        """A step of so many rows, with nothing else of the generation under way, took so long."""
        if self._recalled and self.ready:
            seconds = min(seconds, _HELD_UP * self.times.of(rows))
        self._recalled = False
        self.times.measured(rows, seconds)
        if self._pool is not None:
            self._pool.step_seconds = self.times.first

    def recalled(self) -> None:
        """Steps that were under way have been called back; servers may be at one of them for a while."""
        self._recalled = True

    def followed(self, rows: int, seconds: float) -> None:
        """A step that was sent right behind another came back so long after it."""
        seconds -= self.times.growth * (rows - 1) / self._stages
        seconds = min(max(seconds, 0.0), self.times.first)
        self._interval += (seconds - self._interval) * (0.2 if self._interval else 1.0)

    def lengths(self, likely: Sequence[Sequence[float]]) -> list[int]:
        """How many of the tokens proposed for each sequence to verify in a step that is alone under way.

        ``likely`` says of each how probable it is when those before it are right. 0 for all means plain
        decoding.
        """
        if self.settings.length is not None:
            return [min(self.settings.length, len(each)) for each in likely]
        if not self.ready:
            return [0] * len(likely)
        plain = len(likely) / self.times.first
        gains = sorted(
            ((gain, place) for place, each in enumerate(likely) for gain in accumulate(each, mul)),
            key=lambda found: -found[0],
        )
        tokens, seconds, best, count = float(len(likely)), self.times.first, plain, 0
        for taken, (gain, _) in enumerate(gains[: self.settings.max_tokens * len(likely)], 1):
            tokens, seconds = tokens + gain, seconds + self.growth
            if tokens / seconds < best:
                break
            best, count = tokens / seconds, taken
        lengths = [0] * len(likely)
        if best >= MARGIN * plain:
            for _, place in gains[:count]:
                lengths[place] += 1
        return lengths

    def plan(self, likely: Sequence[float]) -> Plan:
        """What to do with a proposal for a text that is alone in its session, when nothing is under way."""
        alone = self.lengths([likely])[0]
        settings = self.settings
        if settings.depth is not None or settings.length is not None:
            depth = settings.depth or self.max_depth
            return Plan(alone, min(depth, self.max_depth))
        if alone == 0 or self.max_depth == 1:
            return Plan(alone, 1)
        usual = math.exp(sum(math.log(max(each, 1e-3)) for each in likely) / len(likely))
        run = 1 / (1 - min(usual, _MOST_LIKELY))
        """Tokens that are right, one after the other, and the one after them, which is the model's own."""
        whole = self.times.first
        tokens = 1 + sum(accumulate(likely[:alone], mul))
        best_length, depth, best = alone, 1, MARGIN * tokens / (whole + self.growth * alone)
        for length in _LENGTHS:
            if length > min(settings.max_tokens, len(likely)):
                break
            # Behind the first one a chunk is its drafts alone, and brings as many tokens.
            interval = self.interval + self.growth * (length - 1) / self._stages
            steps = max((run - 1) / length, 1.0)
            # In the mean a run ends in the middle of a chunk, and what was sent behind it holds up the next.
            rate = run / (whole + self.growth * length + (steps - 0.5) * interval)
            if rate > _NEARLY * best:
                best, best_length = max(rate, best), length
                depth = 1 + math.ceil((whole + self.growth * length) / max(interval, 1e-6))
        return Plan(best_length, min(depth, self.max_depth))

    def behind(self, likely: Sequence[float], ahead: float, most: int) -> int:
        """How many of ``most`` proposed tokens to send behind steps that are under way; 0 for none yet.

        ``ahead`` is how probable it is that all drafts under way are right. What is sent behind them saves a
        way through the chain if so; else it keeps the slowest stage while the next step comes.
        """
        count = min(most, len(likely))
        if self.settings.depth is not None or count == 0:
            return count
        right = ahead * likely[0]
        held = self.interval * self.sharing
        saved = max(self.times.first - self.interval, 0.0)
        return count if right * saved > (1 - right) * held else 0
