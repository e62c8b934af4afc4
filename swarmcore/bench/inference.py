"""Tokens per second of plain Transformers, llama.cpp, swarms of server processes, and clients at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import attrs
from rich.table import Table

from swarmcore.bench.plain import PlainModel
from swarmcore.bench.swarms import start_swarm
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.swarm import Swarm, connect
from swarmcore.session.steps import JournalMode
from swarmcore.types import Progress

if TYPE_CHECKING:
    from swarmcore.bench.llama_cpp_peer import LlamaCppModel
    from swarmcore.client.generation.model import RemoteModel

P = ParamSpec("P")

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
    processor: float | None = None
    """Milliseconds of processor time for a token, of client and servers together, what prompts take included;
    the median of the rounds. What else runs on the machine changes it least of all."""
    peer_ratio: float | None = None
    """To llama.cpp with as many clients, where that was measured; the median of the rounds."""
    batches: BatchFigures | None = None
    """Of the servers; the median of the rounds."""


@attrs.frozen
class BatchFigures:
    """How servers batched the steps of clients, on average over the servers of a chain."""

    tokens: float
    """In a batch of decode steps."""
    per_second: float
    """Batches."""
    waited: float
    """The part of the time that batches waited for more steps."""


@attrs.frozen
class _Measured:
    """One figure of one round."""

    servers: int
    clients: int
    against: str
    rate: float
    """Tokens per second."""
    processor: float | None = None
    """Seconds of all processes for a token."""
    batches: BatchFigures | None = None


Counters = Sequence[Mapping[str, float]]
"""Those of each server of a chain."""


@attrs.frozen(kw_only=True)
class InferenceBench:
    """What to measure."""

    model: str
    executor: str = "auto"
    """What servers compute with, and"""
    weights: str = "auto"
    """what they keep weights in; as ``swarmcore serve`` takes both."""
    peer: str | None = None
    """``"llama.cpp"`` to measure that on the same GGUF, too."""
    dtype: str = "bfloat16"
    threads: int = 1
    swarm_sizes: tuple[int, ...] = (1, 3)
    client_counts: tuple[int, ...] = (1, 4, 16)
    """Generations at once, over each of the swarms; one is always measured."""
    tokens: int = 64
    speculation: Literal["off", "auto"] = "off"
    """Whether clients draft, as they do by themselves; without, every token is a step."""
    rounds: int = 3

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[InferenceResult]:
        """Start the swarms, measure in turn, stop them. Takes a minute or two on a small machine."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark("loading the model, and starting the swarms")
        plain = await asyncio.to_thread(PlainModel, checkpoint, self.dtype, self.threads)
        async with AsyncExitStack() as stack:
            peer = await asyncio.to_thread(self._peer)
            if peer is not None:
                stack.callback(peer.close)
            swarms = {}
            for size in self.swarm_sizes:
                swarms[size] = await stack.enter_async_context(self._swarm(checkpoint, size))
            samples: dict[str, list[_Measured]] = {}
            # The first round warms everything up: allocators, connections, kernels. It does not count.
            for turn in range(self.rounds + 1):
                remark(f"round {turn} of {self.rounds}" if turn else "warming up")
                for name, found in (await self._round(plain, peer, swarms)).items():
                    if turn:
                        samples.setdefault(name, []).append(found)
        return _results(samples)

    @property
    def _counts(self) -> list[int]:
        return sorted({1, *self.client_counts})

    def _peer(self) -> LlamaCppModel | None:
        if self.peer is None:
            return None
        from swarmcore.bench.llama_cpp_peer import LlamaCppModel, gguf_file

        room = self.tokens + len(PROMPT)  # no tokenizer makes more tokens than there are characters
        return LlamaCppModel(
            gguf_file(self.model), threads=self.threads, texts=max(self._counts), tokens=room
        )

    async def _round(
        self, plain: PlainModel, peer: LlamaCppModel | None, swarms: dict[int, _Chain]
    ) -> dict[str, _Measured]:
        rate, processor = await _alone(plain.rate, PROMPT, self.tokens)
        measured = {_PLAIN: _Measured(0, 1, _PLAIN, rate, processor / self.tokens)}
        for clients in self._counts:
            made = clients * self.tokens
            if peer is not None:
                rate, processor = await _alone(peer.rate, _prompts(clients), self.tokens)
                measured[_name(0, clients)] = _Measured(0, clients, _name(0, 1), rate, processor / made)
            for size, swarm in swarms.items():
                against = _PLAIN if clients == 1 else _name(size, 1)
                rate, processor, batches = await self._batches(swarm, clients)
                measured[_name(size, clients)] = _Measured(
                    size, clients, against, rate, processor / made, batches
                )
        size = max(swarms)
        without = _journal_name(size, "off")
        for journal, rate in (await self._journal_rates(swarms[size].models)).items():
            measured[_journal_name(size, journal)] = _Measured(size, 1, without, rate)
        return measured

    async def _batches(self, chain: _Chain, clients: int) -> tuple[float, float, BatchFigures]:
        """`_rate`, the processor time of all processes, and how servers batched meanwhile."""
        clock = asyncio.get_running_loop().time
        before, began, own = await chain.counters(), clock(), time.process_time()
        rate = await self._rate(chain.models["client"], clients)
        seconds, own = clock() - began, time.process_time() - own
        after = await chain.counters()
        return (
            rate,
            own + _counted("processor_seconds", before, after),
            _batch_figures(before, after, seconds),
        )

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
            model.generate(
                prompt,
                max_new_tokens=self.tokens,
                min_new_tokens=self.tokens,
                speculation=self.speculation,
            )
            for prompt in _prompts(clients)
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
    async def _swarm(self, checkpoint: Checkpoint, size: int) -> AsyncIterator[_Chain]:
        """``size`` server processes with the blocks split evenly, and models over them."""
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
            models: Models = {}
            for journal in _JOURNALS:
                options = SessionOptions(journal=journal)
                models[journal] = await swarm.load_model(
                    self.model,
                    dtype=self.dtype,
                    threads=self.threads,
                    executor="ggml" if self.executor == "ggml" else "torch",
                    session_options=options,
                )
            await swarm.wait_for_blocks(checkpoint.info, timeout=30)
            yield _Chain(swarm, models)


@attrs.frozen
class _Chain:
    """Servers on this machine, as a client sees them."""

    swarm: Swarm
    models: Models

    async def counters(self) -> Counters:
        """What each server has counted."""
        servers = [server.peer for server in self.swarm.view() if server.span is not None]
        return [(await self.swarm.info(peer)).counters for peer in servers]


_PLAIN = "plain Transformers"
_JOURNALS: tuple[JournalMode, ...] = ("off", "client", "servers")

Models = dict[JournalMode, "RemoteModel"]
"""The same model with each kind of journal."""


def _prompts(clients: int) -> list[str]:
    return [f"{PROMPT} {number}" for number in range(clients)]


def _name(size: int, clients: int) -> str:
    if not size:
        return f"llama.cpp, {clients} text{'s' if clients > 1 else ''}"
    return f"{size} server{'s' if size > 1 else ''}, {clients} client{'s' if clients > 1 else ''}"


def _journal_name(size: int, journal: JournalMode) -> str:
    return f"{size} server{'s' if size > 1 else ''}, journal: {journal}"


async def _alone(rate: Callable[P, float], *args: P.args, **options: P.kwargs) -> tuple[float, float]:
    """What ``rate`` measures in a thread of this process, and the processor time that the process took."""
    before = time.process_time()
    return await asyncio.to_thread(rate, *args, **options), time.process_time() - before


def _counted(name: str, before: Counters, after: Counters) -> float:
    """By all servers, between two looks at their counters."""
    return sum(new[name] - old[name] for old, new in zip(before, after, strict=True))


def _batch_figures(before: Counters, after: Counters, seconds: float) -> BatchFigures:
    batches = _counted("decode_batches", before, after)
    return BatchFigures(
        _counted("decode_tokens", before, after) / batches if batches else 0.0,
        batches / len(after) / seconds,
        _counted("batch_wait_seconds", before, after) / len(after) / seconds,
    )


def _results(samples: Mapping[str, Sequence[_Measured]]) -> list[InferenceResult]:
    def ratio(found: Sequence[_Measured], other: Sequence[_Measured]) -> float:
        # Round by round: what else the machine did then, it did to both.
        return statistics.median(a.rate / b.rate for a, b in zip(found, other, strict=True))

    results: list[InferenceResult] = []
    for name, found in samples.items():
        servers, clients, against = found[0].servers, found[0].clients, found[0].against
        rate = statistics.median(each.rate for each in found)
        peer = (
            samples.get(_name(0, clients)) if servers and against != _journal_name(servers, "off") else None
        )
        batches = [each.batches for each in found if each.batches is not None]
        results.append(
            InferenceResult(
                name=name,
                servers=servers,
                clients=clients,
                tokens_per_second=rate,
                ratio=ratio(found, samples[against]),
                ratio_to=against,
                milliseconds=1000 * clients / rate,
                processor=_median_milliseconds(found),
                peer_ratio=ratio(found, peer) if peer else None,
                batches=BatchFigures(*map(statistics.median, zip(*map(attrs.astuple, batches), strict=True)))
                if batches
                else None,
            )
        )
    return results


def _median_milliseconds(found: Sequence[_Measured]) -> float | None:
    seconds = [each.processor for each in found if each.processor is not None]
    return 1000 * statistics.median(seconds) if seconds else None


def hop_milliseconds(results: Sequence[InferenceResult]) -> float | None:
    """What each further server adds to a token of one client, in ms; None for chains of one length."""
    alone = sorted((r for r in results if r.servers and r.ratio_to == _PLAIN), key=lambda r: r.servers)
    if len(alone) < 2:
        return None
    short, *_, long = alone
    return (long.milliseconds - short.milliseconds) / (long.servers - short.servers)


def inference_table(results: Sequence[InferenceResult]) -> Table:
    """The figures as people read them, in 80 columns."""
    peers = any(result.peer_ratio is not None for result in results)
    table = Table(title="decoding, one machine", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("tok/s", "ms/tok", "ratio", *(["llama.cpp"] if peers else []), "cpu ms", "batch", "waits"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        peer = "" if result.peer_ratio is None else f"{result.peer_ratio:.2f}"
        found = result.batches
        table.add_row(
            result.name,
            f"{result.tokens_per_second:.1f}",
            f"{result.milliseconds:.1f}",
            "" if result.ratio_to == result.name else f"{result.ratio:.2f}",
            *([peer] if peers else []),
            "" if result.processor is None else f"{result.processor:.1f}",
            *([f"{found.tokens:.1f}", f"{found.waited:.0%}"] if found else []),
        )
    hop = hop_milliseconds(results)
    table.caption = (
        "ratio: one client to plain Transformers, several to one, journals to none"
        + ("; llama.cpp: to as many texts there" if peers else "")
        + ". cpu ms: of all processes for a token. batch: tokens in one; waits: the time they waited for more"
        + (f". Each further server adds {hop:.1f} ms to a token." if hop is not None else ".")
    )
    table.caption_justify = "left"
    return table
