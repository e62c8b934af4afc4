"""Tokens per second of plain Transformers, of swarms of server processes, and of several clients at once."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
from rich.table import Table

from swarmcore.bench.plain import PlainModel
from swarmcore.bench.swarms import start_swarm
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.swarm import connect
from swarmcore.session.steps import JournalMode
from swarmcore.types import Progress

if TYPE_CHECKING:
    from swarmcore.client.generation.model import RemoteModel

PROMPT = "The history of the sea is the history of those who crossed it. Long before there were maps,"


@attrs.frozen
class InferenceResult:
    """One measured figure."""

    name: str
    servers: int
    """In the chain; 0 for plain Transformers."""
    clients: int
    tokens_per_second: float
    """Of all clients together; the median of the rounds. The prompt is not in it: from the first token on."""
    ratio: float
    """To what ``ratio_to`` names; the median of the rounds."""
    ratio_to: str
    milliseconds: float
    """Between two tokens of one client."""


@attrs.define
class _Samples:
    """What was measured under one name: tokens per second, in each round."""

    servers: int
    clients: int
    against: str
    rates: list[float] = attrs.field(factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


Measured = dict[str, tuple[int, int, str, float]]
"""Of one round, by name: servers, clients, what it is compared with, tokens per second."""


@attrs.frozen(kw_only=True)
class InferenceBench:
    """What to measure."""

    model: str
    dtype: str = "bfloat16"
    threads: int = 1
    swarm_sizes: tuple[int, ...] = (1, 3)
    client_counts: tuple[int, ...] = (1, 4, 16)
    """Generations at once, over each of the swarms; one is always measured."""
    tokens: int = 64
    rounds: int = 3

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[InferenceResult]:
        """Start the swarms, measure in turn, stop them. Takes a minute or two on a small machine."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark("loading the model, and starting the swarms")
        plain = await asyncio.to_thread(PlainModel, checkpoint, self.dtype, self.threads)
        async with AsyncExitStack() as stack:
            swarms = {}
            for size in self.swarm_sizes:
                swarms[size] = await stack.enter_async_context(self._swarm(checkpoint, size))
            samples: dict[str, _Samples] = {}
            # The first round warms everything up: allocators, connections, kernels. It does not count.
            for turn in range(self.rounds + 1):
                remark(f"round {turn} of {self.rounds}" if turn else "warming up")
                measured = await self._round(plain, swarms)
                if turn:
                    for name, (servers, clients, against, rate) in measured.items():
                        samples.setdefault(name, _Samples(servers, clients, against)).rates.append(rate)
        return _results(samples)

    async def _round(self, plain: PlainModel, swarms: dict[int, Models]) -> Measured:
        rate = await asyncio.to_thread(plain.rate, PROMPT, self.tokens)
        measured: Measured = {_PLAIN: (0, 1, _PLAIN, rate)}
        for size, models in swarms.items():
            for clients in sorted({1, *self.client_counts}):
                against = _PLAIN if clients == 1 else _name(size, 1)
                rate = await self._rate(models["client"], clients)
                measured[_name(size, clients)] = (size, clients, against, rate)
        size = max(swarms)
        without = _journal_name(size, "off")
        for journal, rate in (await self._journal_rates(swarms[size])).items():
            measured[_journal_name(size, journal)] = (size, 1, without, rate)
        return measured

    async def _journal_rates(self, models: Models) -> dict[JournalMode, float]:
        """One client with each kind of journal, there and back, so that a drift of the machine hits all."""
        rates: dict[JournalMode, list[float]] = {journal: [] for journal in models}
        for journal in (*models, *reversed(models)):
            rates[journal].append(await self._rate(models[journal], 1))
        return {journal: statistics.mean(measured) for journal, measured in rates.items()}

    async def _rate(self, model: RemoteModel, clients: int) -> float:
        """Tokens per second of ``clients`` generations at once, from the last one's first token on."""
        clock = asyncio.get_running_loop().time
        generations = [
            model.generate(f"{PROMPT} {number}", max_new_tokens=self.tokens, min_new_tokens=self.tokens)
            for number in range(clients)
        ]
        started: list[tuple[float, int]] = []

        async def drain(generation: Any) -> None:
            await anext(generation)
            started.append((clock(), sum(g.new_tokens for g in generations)))
            async for _ in generation:
                pass

        await asyncio.gather(*map(drain, generations))
        began, before = started[-1]
        return (self.tokens * clients - before) / (clock() - began)

    @asynccontextmanager
    async def _swarm(self, checkpoint: Checkpoint, size: int) -> AsyncIterator[Models]:
        """``size`` server processes with the blocks split evenly, and models over them."""
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(
                start_swarm(checkpoint, size, dtype=self.dtype, threads=self.threads)
            )
            swarm = await stack.enter_async_context(connect(address))
            models: Models = {}
            for journal in _JOURNALS:
                options = SessionOptions(journal=journal)
                models[journal] = await swarm.load_model(
                    str(checkpoint.folder), dtype=self.dtype, threads=self.threads, session_options=options
                )
            await swarm.wait_for_blocks(checkpoint.info, timeout=30)
            yield models


_PLAIN = "plain Transformers"
_JOURNALS: tuple[JournalMode, ...] = ("off", "client", "servers")

Models = dict[JournalMode, "RemoteModel"]
"""The same model with each kind of journal."""


def _name(size: int, clients: int) -> str:
    return f"{size} server{'s' if size > 1 else ''}, {clients} client{'s' if clients > 1 else ''}"


def _journal_name(size: int, journal: JournalMode) -> str:
    return f"{size} server{'s' if size > 1 else ''}, journal: {journal}"


def _results(samples: dict[str, _Samples]) -> list[InferenceResult]:
    results: list[InferenceResult] = []
    for name, found in samples.items():
        # Round by round: what else the machine did then, it did to both.
        ratios = [a / b for a, b in zip(found.rates, samples[found.against].rates, strict=True)]
        results.append(
            InferenceResult(
                name=name,
                servers=found.servers,
                clients=found.clients,
                tokens_per_second=found.rate,
                ratio=statistics.median(ratios),
                ratio_to=found.against,
                milliseconds=1000 * found.clients / found.rate,
            )
        )
    return results


def hop_milliseconds(results: Sequence[InferenceResult]) -> float | None:
    """What each further server adds to a token of one client, in ms; None for chains of one length."""
    alone = sorted((r for r in results if r.servers and r.ratio_to == _PLAIN), key=lambda r: r.servers)
    if len(alone) < 2:
        return None
    short, *_, long = alone
    return (long.milliseconds - short.milliseconds) / (long.servers - short.servers)


def inference_table(results: Sequence[InferenceResult]) -> Table:
    """The figures as people read them."""
    table = Table(title="decoding, one machine")
    table.add_column("")
    for name in ("tokens/s", "ms per token", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("to")
    for result in results:
        table.add_row(
            result.name,
            f"{result.tokens_per_second:.1f}",
            f"{result.milliseconds:.1f}",
            f"{result.ratio:.2f}",
            "" if result.ratio_to == result.name else result.ratio_to,
        )
    if (hop := hop_milliseconds(results)) is not None:
        table.caption = f"each further server adds {hop:.1f} ms to a token"
    return table
