"""Sequences that go on with rows drafted ahead, of which some are kept: several chunks under way at a time.

What is kept, and when, is drawn from a seed. Of every row that is kept the output has to be what the whole
model makes of all rows kept before it, bit for bit.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import attrs
from memory_swarm import Reference

from swarmcore.client.session.session import InferenceSession, SentStep
from swarmcore.testing.executor import Rows, hidden_states, read_rows


def rows_of(tokens: Sequence[int]) -> Rows:
    """A row for each token below 4096, of values that survive float32 unchanged."""
    return [[(token * (n + 3) % 4096) / 4096 for n in range(4)] for token in tokens]


def tokens_of(rows: Rows) -> list[int]:
    """What `rows_of` made them of."""
    return [round(row[0] * 4096) * pow(3, -1, 4096) % 4096 for row in rows]


@attrs.frozen
class Draft:
    """A chunk under way: new rows of each sequence, at ``starts``."""

    step: SentStep
    starts: tuple[int, ...]
    rows: tuple[Rows, ...]
    sound: tuple[bool, ...]
    """Of which sequences all that it builds on was kept so far."""


class DraftedText:
    """``kept`` rows of each sequence, and what is drafted after them."""

    def __init__(
        self,
        session: InferenceSession,
        seed: int = 0,
        *,
        depth: int = 4,
        acceptance: float = 0.8,
        longest: int = 4,
    ) -> None:
        self.session = session
        self.chance = random.Random(seed)
        self.kept: list[Rows] = [[] for _ in range(session.sequences)]
        self.recalls = 0
        self._depth, self._acceptance, self._longest = depth, acceptance, longest
        self._reference = Reference(session.sequences)
        self._ahead: deque[Draft] = deque()
        self._starts = [0] * session.sequences

    def new_rows(self, count: int) -> Rows:
        return rows_of([self.chance.randrange(4096) for _ in range(count)])

    async def prompt(self, *lengths: int, rows: Sequence[Rows] = ()) -> None:
        await self.send(lengths, rows)
        await self.receive(accept=lengths)

    async def send(self, lengths: Sequence[int] | None = None, rows: Sequence[Rows] = ()) -> None:
        """A chunk more of what is drafted."""
        lengths = lengths or [self.chance.randint(0, self._longest) for _ in self.kept]
        if not any(lengths):
            return
        rows = rows or tuple(map(self.new_rows, lengths))
        starts = tuple(self._starts)
        flat = hidden_states([row for new in rows for row in new])
        step = await self.session.send(flat, lengths, starts=starts, reply="all")
        self._ahead.append(Draft(step, starts, rows, (True,) * len(rows)))
        self._starts = [start + len(new) for start, new in zip(starts, rows, strict=True)]

    async def receive(self, accept: Sequence[int] | None = None) -> None:
        """The outputs of the next chunk, of which some are kept."""
        draft = self._ahead.popleft()
        output = read_rows(await self.session.receive(draft.step))
        again = [False] * len(self.kept)
        expected = await self._expected(draft)
        row = 0
        for i, new in enumerate(draft.rows):
            if draft.sound[i]:
                assert len(self.kept[i]) == draft.starts[i]
                assert output[row : row + len(new)] == expected[i]
                keep = self._accepted(len(new)) if accept is None else accept[i]
                self.kept[i] += new[:keep]
                again[i] = keep < len(new)
            row += len(new)
        if any(again):
            await self._drop(again)

    def _accepted(self, count: int) -> int:
        return next((n for n in range(count) if self.chance.random() > self._acceptance), count)

    async def _expected(self, draft: Draft) -> list[Rows]:
        outputs = []
        for kept, new in zip(self.kept, draft.rows, strict=True):
            [*rows] = kept
            outputs.append(await Reference().step([rows + new], reply="all") if new else [])
            outputs[-1] = outputs[-1][len(rows) :]
        return outputs

    async def _drop(self, again: Sequence[bool]) -> None:
        """Some sequences go on from what was kept of them: what is under way of them is of no use."""
        if self._ahead and (len(self.kept) == 1 or self.chance.random() < 0.7):
            self.recalls += 1
            await self.session.recall(self._ahead[0].step)
            self._ahead.clear()
            self._starts = list(map(len, self.kept))
            if self.chance.random() < 0.5:
                self.session.rollback(self._starts)
            return
        # The others' rows are good all the same: what was sent goes on, and later starts are lower.
        self._ahead = deque(
            attrs.evolve(draft, sound=tuple(s and not a for s, a in zip(draft.sound, again, strict=True)))
            for draft in self._ahead
        )
        self._starts = [
            len(kept) if dropped else start
            for kept, dropped, start in zip(self.kept, again, self._starts, strict=True)
        ]
        if self.chance.random() < 0.5:
            self.session.rollback(self._starts)

    async def think_again(self) -> None:
        """Call back the end of what is under way, while the rest goes on."""
        if len(self._ahead) > 1:
            first = self.chance.randrange(1, len(self._ahead))
            await self.session.recall(self._ahead[first].step)
            self.recalls += 1
            while len(self._ahead) > first:
                self._ahead.pop()
            self._starts = list(map(min, self._starts, self.session.positions))

    async def go_on(self, chunks: int) -> None:
        """Send and receive until so many chunks have come back."""
        while chunks:
            while len(self._ahead) < self._depth and self.chance.random() < 0.9:
                await self.send()
            if self.chance.random() < 0.1:
                await self.think_again()
            if self._ahead:
                chunks -= 1
                await self.receive()

    async def end(self) -> None:
        """Receive, or call back, what is under way."""
        if self._ahead and self.chance.random() < 0.5:
            await self.session.recall(self._ahead[-1].step)
            self._ahead.pop()
        while self._ahead:
            await self.receive(accept=[len(new) for new in self._ahead[0].rows])
