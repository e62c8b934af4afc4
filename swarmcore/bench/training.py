"""Forward and backward through remote blocks beside plain PyTorch, and what generation loses meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.bench.plain import PlainBlocks
from swarmcore.bench.swarms import start_swarm
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.swarm import connect
from swarmcore.errors import InputError
from swarmcore.types import Progress

if TYPE_CHECKING:
    import torch

    from swarmcore.client.generation.model import RemoteModel

_PLAIN = "plain PyTorch"
_PROMPT = "The history of the sea is the history of those who crossed it."


@attrs.frozen
class TrainingResult:
    """Batches through the blocks, and back to their inputs."""

    name: str
    forward: float
    """Tokens per second; the median of the rounds."""
    both: float
    """Tokens per second, forward and backward together."""
    forward_ratio: float
    """To plain PyTorch in the same round; the median of the rounds."""
    both_ratio: float


@attrs.frozen
class FairnessResult:
    """Decode steps of one generation, with and without a training client at full load."""

    idle: float
    """Milliseconds within which 95 % of the tokens came, alone."""
    loaded: float
    """The same beside the training."""
    trained: float
    """Tokens per second, forward and backward, that the training got through meanwhile."""

    @property
    def ratio(self) -> float:
        return self.loaded / self.idle


@attrs.frozen(kw_only=True)
class TrainingBench:
    """What to measure."""

    model: str
    dtype: str = "float32"
    threads: int = 1
    swarm_sizes: tuple[int, ...] = (1, 2)
    batch: int = 8
    length: int = 128
    micro_batch_tokens: int = 512
    rounds: int = 3
    decode_tokens: int = 192

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> tuple[list[TrainingResult], FairnessResult]:
        """Start the swarms, measure in turn, stop them. Takes a minute or two on a small machine.

        Raise `InputError` for sequences longer than the model takes, or more servers than it has blocks.
        """
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        positions = getattr(checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and self.length > positions:
            raise InputError(f"{checkpoint.name} takes {positions} tokens, not sequences of {self.length}")
        remark("loading the model, and starting the swarms")
        shape = (self.batch, self.length)
        plain = await asyncio.to_thread(PlainBlocks, checkpoint, self.dtype, self.threads, shape)
        times: dict[str, list[tuple[float, float]]] = {}
        async with AsyncExitStack() as stack:
            models = {}
            for size in self.swarm_sizes:
                name = f"{size} server{'s' if size > 1 else ''}"
                models[name] = await stack.enter_async_context(self._model(checkpoint, size))
            # The first round warms everything up, and does not count.
            for turn in range(self.rounds + 1):
                remark(f"round {turn} of {self.rounds}" if turn else "warming up")
                measured = {_PLAIN: await asyncio.to_thread(plain.times)}
                for name, model in models.items():
                    measured[name] = await self._times(model, plain.hidden)
                if turn:
                    for name, found in measured.items():
                        times.setdefault(name, []).append(found)
            remark("generating beside the training")
            fairness = await self._fairness(next(iter(models.values())), plain.hidden)
        return self._results(times), fairness

    async def _times(self, model: RemoteModel, hidden: torch.Tensor) -> tuple[float, float]:
        """Seconds of a forward pass, and of one with a backward pass."""
        import torch

        clock = time.perf_counter
        began = clock()
        with torch.no_grad():
            await model.blocks.forward_async(hidden)
        forward = clock() - began
        began = clock()
        await _forward_and_back(model, hidden)
        return forward, clock() - began

    async def _fairness(self, model: RemoteModel, hidden: torch.Tensor) -> FairnessResult:
        idle = await self._step_times(model)
        trained = 0
        clock = time.perf_counter
        stop = asyncio.Event()

        async def train() -> None:
            nonlocal trained
            while not stop.is_set():
                await _forward_and_back(model, hidden[:1])
                trained += self.length

        # Two at a time, so that the server is never without work.
        training = [asyncio.create_task(train()) for _ in range(2)]
        began = clock()
        try:
            loaded = await self._step_times(model)
            rate = trained / (clock() - began)
        finally:
            stop.set()
            await asyncio.gather(*training)
        return FairnessResult(_p95(idle), _p95(loaded), rate)

    async def _step_times(self, model: RemoteModel) -> list[float]:
        """Milliseconds between the tokens of a generation."""
        clock = time.perf_counter
        generation = model.generate(
            _PROMPT,
            max_new_tokens=self.decode_tokens,
            min_new_tokens=self.decode_tokens,
            speculation="off",
        )
        moments: list[tuple[int, float]] = []
        async for _ in generation:
            moments.append((generation.new_tokens, clock()))
        # A piece of text can be of several tokens.
        return [
            1000 * (after[1] - before[1]) / max(1, after[0] - before[0])
            for before, after in pairwise(moments)
        ]

    def _results(self, times: dict[str, list[tuple[float, float]]]) -> list[TrainingResult]:
        tokens = self.batch * self.length
        results = []
        for name, found in times.items():
            against = times[_PLAIN]
            results.append(
                TrainingResult(
                    name,
                    tokens / statistics.median(forward for forward, _ in found),
                    tokens / statistics.median(both for _, both in found),
                    statistics.median(a[0] / b[0] for a, b in zip(against, found, strict=True)),
                    statistics.median(a[1] / b[1] for a, b in zip(against, found, strict=True)),
                )
            )
        return results

    @asynccontextmanager
    async def _model(self, checkpoint: Checkpoint, size: int) -> AsyncIterator[RemoteModel]:
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(
                start_swarm(checkpoint, size, dtype=self.dtype, threads=self.threads)
            )
            swarm = await stack.enter_async_context(connect(address))
            yield await swarm.load_model(
                str(checkpoint.folder),
                dtype=self.dtype,
                threads=self.threads,
                pass_options=PassOptions(micro_batch_tokens=self.micro_batch_tokens),
            )


async def _forward_and_back(model: RemoteModel, hidden: torch.Tensor) -> None:
    import torch

    inputs = hidden.clone().requires_grad_()
    output = await model.blocks.forward_async(inputs)
    await asyncio.to_thread(torch.autograd.grad, output, inputs, torch.ones_like(output))


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def training_table(results: Sequence[TrainingResult], fairness: FairnessResult) -> Table:
    """The figures as people read them."""
    table = Table(title="batches through the blocks, tokens/s, one machine")
    table.add_column("")
    for name in ("forward", "ratio", "forward + backward", "ratio"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.forward:.0f}",
            f"{result.forward_ratio:.2f}",
            f"{result.both:.0f}",
            f"{result.both_ratio:.2f}",
        )
    table.caption = (
        f"95 % of decode steps within {fairness.idle:.0f} ms alone, {fairness.loaded:.0f} ms beside training "
        f"({fairness.ratio:.1f}x), which got {fairness.trained:.0f} tokens/s"
    )
    return table
