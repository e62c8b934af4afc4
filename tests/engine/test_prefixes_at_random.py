"""Sessions at random over few texts in little cache: what comes out is right, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import attrs
import pytest
from counting_engine import expected, running, submit_beams

from swarmcore.engine.engine import Engine
from swarmcore.errors import CacheFullError, SessionLostError
from swarmcore.testing.executor import CountingExecutor, Rows, read_rows

PAGE = 4
CACHE = 15 * PAGE


def rows_of(text: str) -> Rows:
    """Values that survive float32 unchanged."""
    return [[(ord(letter) * (n + 3) % 4096) / 4096 for n in range(4)] for letter in text]


def names_of(text: str) -> bytes:
    return b"".join(
        f"{hash(text[:end]) & (2**60 - 1):016x}".encode()[:16] for end in range(PAGE, len(text) + 1, PAGE)
    )


@attrs.define
class Session:
    name: str
    texts: list[str]


class World:
    """Does things at random to an engine, and knows what should come of them."""

    def __init__(self, engine: Engine, executor: CountingExecutor, seed: int) -> None:
        self.engine, self.executor, self.random = engine, executor, random.Random(seed)
        self.sessions: list[Session] = []
        self.hits = 0
        self.numbers: Iterator[int] = iter(range(10**6))

    def text(self) -> str:
        """A beginning that others have, too, and an end of its own."""
        common = "the sea, the sea and the ships"[: self.random.choice((8, 16, 24, 30))]
        return common + "".join(self.random.choices("ab", k=self.random.randrange(1, 6)))

    async def open(self) -> None:
        if len(self.sessions) == 4:
            return
        session = Session(
            f"s{next(self.numbers)}", [self.text() for _ in range(self.random.choice((1, 1, 2)))]
        )
        names = [names_of(text) for text in session.texts]
        caller = self.random.choice(("alice", "bob"))
        try:
            cached = await self.engine.open(
                session.name, len(names), 0, timeout=0.0, caller=caller, names=names
            )
        except CacheFullError:
            return
        self.hits += sum(map(bool, cached))
        starts = [min(each, len(text) - 1) for each, text in zip(cached, session.texts, strict=True)]
        starts = [self.random.choice((start, start, 0)) for start in starts]
        whole, session.texts = (
            session.texts,
            [text[:start] for text, start in zip(session.texts, starts, strict=True)],
        )
        self.sessions.append(session)
        await self.step(session, [text[start:] for text, start in zip(whole, starts, strict=True)], starts)

    async def step(
        self, session: Session, new: list[str], starts: list[int], sources: tuple[int, ...] = ()
    ) -> None:
        before = [session.texts[source] for source in sources] if sources else session.texts
        after = [text[:start] + more for text, start, more in zip(before, starts, new, strict=True)]
        try:
            output = await submit_beams(
                self.engine, session.name, starts, list(map(rows_of, new)), sources, timeout=0.02
            )
        except (CacheFullError, SessionLostError):
            self.engine.close_session(session.name)
            self.sessions.remove(session)
            return
        wholes = [await expected(rows_of(text)) for text in after]
        assert read_rows(output) == [
            row for whole, more in zip(wholes, new, strict=True) for row in whole[len(whole) - len(more) :]
        ]
        session.texts = after

    async def more(self) -> None:
        if session := self.any_session():
            lengths = [len(text) for text in session.texts]
            await self.step(session, [self.random.choice("ab") for _ in lengths], lengths)

    async def roll_back(self) -> None:
        if session := self.any_session():
            starts = [self.random.randrange(len(text)) for text in session.texts]
            await self.step(session, [self.random.choice("abc") for _ in starts], starts)

    async def reorder(self) -> None:
        if session := self.any_session():
            many = len(session.texts)
            sources = tuple(self.random.randrange(many) for _ in range(many))
            starts = [len(session.texts[source]) for source in sources]
            await self.step(session, ["a"] * many, starts, sources)

    async def name(self) -> None:
        if session := self.any_session():
            self.engine.name_prefixes(session.name, list(map(names_of, session.texts)))

    async def close(self) -> None:
        if session := self.any_session():
            self.engine.close_session(session.name)
            self.sessions.remove(session)

    def any_session(self) -> Session | None:
        return self.random.choice(self.sessions) if self.sessions else None


@pytest.mark.parametrize("seed", range(3))
async def test_at_random(seed: int) -> None:
    async with running(cache_tokens=CACHE, page=PAGE, named_tokens=PAGE) as (engine, executor):
        executor.prefix_sharing = "copies"
        world = World(engine, executor, seed)
        for _ in range(70):
            act = world.random.choice(
                (world.open, world.open, world.more, world.roll_back, world.reorder, world.name, world.close)
            )
            await act()
            assert engine.prefixes.pages <= engine._kv_cache.free
        assert world.hits > 2
        while world.sessions:
            await world.close()
        assert executor.reserved_tokens == PAGE * engine.prefixes.pages
