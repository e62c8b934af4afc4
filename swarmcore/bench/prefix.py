"""What a session gains that begins with what servers have computed before: time to its first token."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.bench.swarms import start_swarm
from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.swarm import connect
from swarmcore.types import Progress

if TYPE_CHECKING:
    from swarmcore.client.generation.model import RemoteModel

PASSAGE = "On day {} the crew saw {} gulls, {} whales and no land at all, and the captain wrote it down. "
QUESTIONS = "How many whales were there on the first day?", "What did the captain write down, and why?"


@attrs.frozen
class PrefixResult:
    """What was measured over one chain."""

    servers: int
    first_seconds: float
    """To the first token of a session whose prompt nobody has seen; the median of the rounds."""
    again_seconds: float
    """To that of a session which has the first tokens of its prompt in common with it."""
    ratio: float
    """Of the one to the other; the median of the rounds."""
    cached_tokens: int
    """Of the second prompt, not computed again."""
    texts: int
    same_texts: int
    """How many of the second texts are those that come out when all is computed."""


@attrs.frozen(kw_only=True)
class PrefixBench:
    """What to measure."""

    model: str
    executor: str = "auto"
    weights: str = "auto"
    dtype: str = "bfloat16"
    threads: int = 1
    swarm_sizes: tuple[int, ...] = (1, 2)
    shared: int = 2000
    """Tokens with which both prompts of a round begin; other ones in each round."""
    tokens: int = 16
    """Of each text."""
    rounds: int = 3

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[PrefixResult]:
        """Start one swarm after the other, measure, stop it."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        results = []
        for size in self.swarm_sizes:
            remark(f"starting {size} server{'s' * (size > 1)}")
            async with AsyncExitStack() as stack:
                address = await stack.enter_async_context(
                    start_swarm(
                        checkpoint,
                        size,
                        dtype=self.dtype,
                        threads=self.threads,
                        model=self.model,
                        executor=self.executor,
                        weights=self.weights,
                    )
                )
                swarm = await stack.enter_async_context(connect(address))
                caching, computing = [
                    await swarm.load_model(
                        str(checkpoint.folder),
                        dtype=self.dtype,
                        threads=self.threads,
                        session_options=SessionOptions(prefix_cache=prefix_cache),
                    )
                    for prefix_cache in (True, False)
                ]
                await swarm.wait_for_blocks(checkpoint.info, timeout=30)
                rounds = []
                for turn in range(self.rounds + 1):
                    remark(f"round {turn} of {self.rounds}" if turn else "warming up")
                    rounds.append(await self._round(caching, computing, turn))
                results.append(_result(size, rounds[1:]))
        return results

    async def _round(self, caching: RemoteModel, computing: RemoteModel, turn: int) -> _Round:
        passage = "".join(PASSAGE.format(day, day * turn + 3, day + turn) for day in range(self.shared // 10))
        shared = (await caching.encode(passage)).tokens[: self.shared]
        one, other = [shared + (await caching.encode(question)).tokens for question in QUESTIONS]
        first, _, _ = await self._generate(caching, one)
        again, text, cached = await self._generate(caching, other)
        _, expected, _ = await self._generate(computing, other)
        return _Round(first, again, cached, text == expected)

    async def _generate(self, model: RemoteModel, prompt: list[int]) -> tuple[float, list[int], int]:
        """Seconds to the first token, all tokens, and how many of the prompt were there already."""
        generation = model.generate(prompt, max_new_tokens=self.tokens, min_new_tokens=self.tokens)
        await generation
        assert generation.first_token_seconds is not None
        return generation.first_token_seconds, generation.tokens, generation.cached_tokens


@attrs.frozen
class _Round:
    first: float
    again: float
    cached: int
    same: bool


def _result(servers: int, rounds: Sequence[_Round]) -> PrefixResult:
    return PrefixResult(
        servers=servers,
        first_seconds=statistics.median(each.first for each in rounds),
        again_seconds=statistics.median(each.again for each in rounds),
        ratio=statistics.median(each.again / each.first for each in rounds),
        cached_tokens=min(each.cached for each in rounds),
        texts=len(rounds),
        same_texts=sum(each.same for each in rounds),
    )


def prefix_table(results: Sequence[PrefixResult]) -> Table:
    """The figures as people read them."""
    table = Table(title="to the first token, with and without what was computed before")
    for name in ("servers", "first s", "again s", "ratio", "cached tokens", "same texts"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            str(result.servers),
            f"{result.first_seconds:.2f}",
            f"{result.again_seconds:.2f}",
            f"{result.ratio:.2f}",
            str(result.cached_tokens),
            f"{result.same_texts} of {result.texts}",
        )
    return table
