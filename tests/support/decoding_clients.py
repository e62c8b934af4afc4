"""Clients that decode over a chain of engines on virtual time.

What machines and links cost is made up; the engines, and how they and clients batch, are real. As a program
it prints what clients gain.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Hashable, Sequence
from typing import Any

import attrs

from swarmcore.engine.batch_window import BatchWindow
from swarmcore.engine.engine import Engine
from swarmcore.executor.base import ScheduledChunk
from swarmcore.testing import clock
from swarmcore.testing.executor import CountingExecutor, hidden_states
from swarmcore.wire.tensors import Tensor

ROW = hidden_states([[0.5] * 4])


@attrs.frozen
class Cost:
    """Seconds of a pass: a part for the pass, and one for each of its rows."""

    fixed: float
    row: float

    def seconds(self, rows: int) -> float:
        return self.fixed + self.row * rows


@attrs.frozen(kw_only=True)
class Decoding:
    """What is simulated. All clients are in one process, unless they are ``apart``."""

    stages: Sequence[Cost]
    head: Cost = Cost(0.003, 0.0007)
    delay: float = 0.0005
    """Seconds of each hop, one way,"""
    jitter: float = 0.0005
    """and so many more at most."""
    message: float = 0.0004
    """Seconds for which a message keeps the event loop of its process."""
    cores: int = 64
    """Of the one machine that all of it runs on."""
    apart: bool = False
    think: float = 0.0
    """Seconds that a client takes over a token on average, now more and now less."""
    tokens: int = 60
    waits: bool = True
    """Whether batches wait for those who are about to come."""

    def run(self, clients: int, seed: int = 1) -> Decoded:
        """What ``clients`` at once get."""
        return clock.run(_Run(self, clients, random.Random(seed)).run())


@attrs.frozen
class Decoded:
    tokens_per_second: float
    """Of all clients, in the middle of the run."""
    rows: tuple[float, ...]
    """In a pass of each stage, on average."""
    head_rows: float
    busy: tuple[float, ...]
    """The part of the time that each stage is at work."""


class _Run:
    def __init__(self, decoding: Decoding, clients: int, rng: random.Random) -> None:
        self.decoding = decoding
        self.clients = clients
        self.rng = rng
        self.cores = asyncio.Semaphore(decoding.cores)
        self.executors = [_CostExecutor(cost, self.cores) for cost in decoding.stages]
        self.engines = [Engine(executor, cache_tokens=2**20) for executor in self.executors]
        self.loops = [_Loop(decoding.message, self.cores) for _ in self.engines]
        processes = clients if decoding.apart else 1
        self.heads = [_Head(decoding.head, self.cores) for _ in range(processes)]
        if not decoding.waits:
            for window in (*(engine._window for engine in self.engines), *(h.window for h in self.heads)):
                window.wait = _never  # type: ignore[method-assign]
        self.client_loops = [_Loop(decoding.message, self.cores) for _ in self.heads]
        self.times: list[float] = []

    async def run(self) -> Decoded:
        for engine in self.engines:
            await engine.start()
        await asyncio.gather(*map(self._decode, range(self.clients)))
        for engine in self.engines:
            await engine.close()
        count = len(self.times)
        first, last = count // 4, 3 * count // 4
        heads = [size for head in self.heads for size in head.sizes]
        return Decoded(
            (last - first) / (self.times[last] - self.times[first]),
            tuple(engine.stats.mean_batch for engine in self.engines),
            sum(heads) / len(heads),
            tuple(engine.stats.batch_seconds / self.times[-1] for engine in self.engines),
        )

    async def _decode(self, number: int) -> None:
        now = asyncio.get_running_loop().time
        name = f"session {number}"
        head, client_loop = self.heads[number % len(self.heads)], self.client_loops[number % len(self.heads)]
        await asyncio.sleep(0.1 * self.rng.random())
        for engine in self.engines:
            await engine.open(name, 1, 0, timeout=1)
        for position in range(self.decoding.tokens):
            for engine, loop in zip(self.engines, self.loops, strict=True):
                await self._hop(loop)
                await engine.step(name, [position], [1], ROW, timeout=600)
            await self._hop(client_loop)
            await head.choose(name)
            if self.decoding.think:
                await asyncio.sleep(self.rng.expovariate(1 / self.decoding.think))
            self.times.append(now())
        for engine in self.engines:
            engine.close_session(name)

    async def _hop(self, loop: _Loop) -> None:
        await asyncio.sleep(self.decoding.delay + self.decoding.jitter * self.rng.random())
        await loop.take_message()


def _never(*args: Any, **options: Any) -> None:
    return None


class _CostExecutor(CountingExecutor):
    def __init__(self, cost: Cost, cores: asyncio.Semaphore) -> None:
        super().__init__()
        self._cost, self._cores = cost, cores

    async def spend_step(self, batch: Sequence[ScheduledChunk]) -> None:
        async with self._cores:
            await asyncio.sleep(self._cost.seconds(sum(chunk.tokens for chunk in batch)))

    def run_chunk(self, chunk: ScheduledChunk) -> Tensor:
        return chunk.hidden


class _Loop:
    """The event loop of a process: one message at a time."""

    def __init__(self, seconds: float, cores: asyncio.Semaphore) -> None:
        self._seconds, self._cores, self._lock = seconds, cores, asyncio.Lock()

    async def take_message(self) -> None:
        async with self._lock, self._cores:
            await asyncio.sleep(self._seconds)


class _Head:
    """A client's compute thread, which waits as `swarmcore.client.generation.compute` does."""

    def __init__(self, cost: Cost, cores: asyncio.Semaphore) -> None:
        self.sizes: list[int] = []
        self._cost, self._cores = cost, cores
        self.window = BatchWindow(turns=False)
        self._waiting: list[tuple[Hashable, asyncio.Future[None]]] = []
        self._arrived = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    async def choose(self, session: Hashable) -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self.window.arrived(session, loop.time())
        self._waiting.append((session, done))
        self._arrived.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        await done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            since = loop.time()
            while wait := self.window.wait(len(self._waiting), since, loop.time()):
                try:
                    async with asyncio.timeout_at(wait.until):
                        while len(self._waiting) < wait.steps:
                            self._arrived.clear()
                            await self._arrived.wait()
                except TimeoutError:
                    pass
            batch, self._waiting = self._waiting, []
            self.sizes.append(len(batch))
            async with self._cores:
                seconds = self._cost.seconds(len(batch))
                await asyncio.sleep(seconds)
            self.window.passes.note(len(batch), seconds)
            for session, done in batch:
                self.window.answered(session, loop.time())
                done.set_result(None)


SMALL, HALF = Cost(0.015, 0.0009), Cost(0.0075, 0.00045)
LARGE = Cost(0.06, 0.0006)

SITUATIONS = {
    "a server": Decoding(stages=[SMALL]),
    "a chain of two": Decoding(stages=[HALF, HALF]),
    "a chain of two, all on two cores": Decoding(stages=[HALF, HALF], cores=2),
    "a chain of two, large model, two cores": Decoding(stages=[LARGE] * 2, head=Cost(0.014, 0.0004), cores=2),
    "a chain of two, clients apart": Decoding(stages=[HALF, HALF], apart=True),
    "a chain of two, 25 ms apart": Decoding(stages=[HALF, HALF], delay=0.025, jitter=0.002),
}


def main() -> None:
    """Print how many times the tokens of one client several get, as they are and without waiting."""
    print(f"{'':40}" + "".join(f"{clients:>4} clients   " for clients in (2, 4, 16)))
    for name, decoding in SITUATIONS.items():
        cells = []
        for clients in (2, 4, 16):
            found = [attrs.evolve(decoding, waits=waits) for waits in (False, True)]
            gains = [each.run(clients).tokens_per_second / each.run(1).tokens_per_second for each in found]
            cells.append(f"{gains[0]:5.2f} → {gains[1]:5.2f}")
        print(f"{name:40}" + "  ".join(cells))


if __name__ == "__main__":
    main()
