"""Measures what a real executor's time goes to, and fits the cost model of `swarmcore.sim` to it.

    python -m swarmcore.bench.executor_costs --shape bloom-7b1 --out swarmcore/sim/costs/bloom-7b1-cpu.json

Weights are random: they do not change what a pass costs. Only as many blocks are loaded as are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import time
from collections.abc import Collection, Iterator
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any

import attrs
import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarmcore.checkpoint import Checkpoint
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_wire
from swarmcore.sim.costs import BatchLoad, CostModel, MeasuredModel, Measurement
from swarmcore.types import ModelInfo, Progress, Span

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-7b1": (
        "bloom",
        {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880},
    ),
    "llama-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 8192,
        },
    ),
    "tiny": (
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
        },
    ),
}
"""Family, and what its config says; as of the published models of that name."""

DECODES = ((1, 0), (1, 512), (1, 2048), (4, 512), (16, 512))
"""Batches of decode rows: how many, and the cached tokens of each."""
PREFILLS = ((16, 0), (64, 0), (256, 0), (256, 1024), (512, 512))
"""Batches of one prompt's rows: how many, and the tokens before them."""


class RandomCheckpoint(Checkpoint):
    """A checkpoint of the given shape whose tensors are made up when they are read."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        family, fields = SHAPES[shape]
        self.name = shape
        self.folder = Path()
        self.config = AutoConfig.for_model(family, **fields)
        self.config.dtype = dtype
        text = self.config.get_text_config(decoder=True)
        self.info = ModelInfo(shape, f"random-{shape}", text.num_hidden_layers, text.hidden_size)
        self._dtype = dtype
        with torch.device("meta"):
            self._tensors = AutoModelForCausalLM.from_config(self.config).state_dict()

    def names(self) -> Collection[str]:
        return list(self._tensors)

    def nbytes(self, names: Collection[str]) -> int:
        return sum(self._tensors[name].numel() * self._dtype.itemsize for name in names)

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        return {name: self._made_up(name) for name in names}

    def _made_up(self, name: str) -> torch.Tensor:
        return torch.empty(self._tensors[name].shape, dtype=self._dtype).uniform_(-0.02, 0.02)


@attrs.define
class CostBench:
    """Times batches on one executor."""

    executor: TorchExecutor
    rounds: int
    _names: Iterator[int] = attrs.field(factory=count, init=False)

    async def batch(self, blocks: int, sequences: int, rows: int, cached: int) -> Measurement:
        """The least time of ``sequences`` sequences with ``rows`` new tokens each, after ``cached``.

        Whatever else the machine is busy with only adds to it.
        """
        executor = self.executor
        span = Span(executor.span.start, executor.span.start + blocks)
        names = [SequenceId(next(self._names)) for _ in range(sequences)]
        page = executor.page
        for name in names:
            executor.reserve(name, -(-(cached + rows) // page) * page)
            for start in range(0, cached, 512):
                await self._pass(span, [name], start, min(512, cached - start))
        times = []
        for _ in range(self.rounds):
            began = time.perf_counter()
            load = await self._pass(span, names, cached, rows)
            times.append(time.perf_counter() - began)
        for name in names:
            executor.release(name)
        return Measurement(blocks=blocks, load=load, seconds=min(times))

    async def _pass(self, span: Span, names: list[SequenceId], start: int, rows: int) -> BatchLoad:
        hidden = torch.randn(rows, self.executor.model.hidden_size).to(getattr(torch, self.executor.dtype))
        batch = [
            ScheduledChunk(to_wire("hidden", hidden), 0, span, (Segment(name, start, rows),), "last")
            for name in names
        ]
        for result in await self.executor.step(batch):
            if isinstance(result, Exception):
                raise result
        return BatchLoad.of(batch)


def fit(measured: Collection[Measurement]) -> tuple[CostModel, float]:
    """The costs that come closest to all measurements, none of them negative, and how far off they are.

    Each measurement counts the same, whatever it took: errors are relative.
    """
    loads = attrs.fields(BatchLoad)
    rows = [[1.0, m.blocks, *(m.blocks * getattr(m.load, field.name) for field in loads)] for m in measured]
    seconds = torch.tensor([m.seconds for m in measured], dtype=torch.float64)
    weighted = torch.tensor(rows, dtype=torch.float64) / seconds[:, None]
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    columns = weighted.shape[1]
    costs, error = [0.0] * columns, 1.0
    # Of the best fits with some costs at zero, the best without a negative one: few enough to try them all.
    for chosen in chain.from_iterable(combinations(range(columns), size + 1) for size in range(columns)):
        some = weighted[:, chosen]
        scale = some.amax(0)
        values = torch.linalg.lstsq(some / scale, ones, driver="gelsd").solution[:, 0] / scale
        off = (some @ values - 1).square().mean().sqrt().item()
        if off < error and values.min() >= 0:
            found = dict(zip(chosen, values.tolist(), strict=True))
            costs, error = [found.get(column, 0.0) for column in range(columns)], off
    # A cost is called as what it is the cost of, in the singular.
    per_block = dict(zip((field.name.removesuffix("s") for field in loads), costs[2:], strict=True))
    named = {"call": costs[0], "block": costs[1], **per_block}
    return CostModel(**{name: float(f"{cost:.4g}") for name, cost in named.items()}), error


async def measure(shape: str, dtype: str, blocks: int, threads: int, rounds: int) -> MeasuredModel:
    """Time all batches on one and on ``blocks`` blocks of ``shape``."""
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    checkpoint = RandomCheckpoint(shape, precision)
    began = time.perf_counter()
    executor = TorchExecutor.load(checkpoint, Span(0, blocks), dtype=dtype, threads=threads)
    load_seconds = (time.perf_counter() - began) / blocks
    bench = CostBench(executor, rounds)
    measured = []
    for held in (1, blocks):
        await bench.batch(held, 1, 1, 0)  # the first pass is a slow one
        for sequences, cached in DECODES:
            measured.append(await bench.batch(held, sequences, 1, cached))
        for rows, cached in PREFILLS:
            measured.append(await bench.batch(held, 1, rows, cached))
    cache_bytes = executor.cache_bytes_per_token // blocks
    await executor.close()
    costs, error = fit(measured)
    first_block = [name for name in checkpoint.names() if ".0." in name]
    return MeasuredModel(
        name=shape,
        blocks=checkpoint.info.blocks,
        row_bytes=checkpoint.info.hidden_size * precision.itemsize,
        cache_bytes=cache_bytes,
        block_bytes=checkpoint.nbytes(first_block),
        machine=f"{_processor()}, {threads} threads, {dtype}, torch {torch.__version__}",
        command="python -m swarmcore.bench.executor_costs " + " ".join(sys.argv[1:]),
        costs=costs,
        load_seconds=round(load_seconds, 3),
        fit_error=round(error, 3),
        measured=tuple(attrs.evolve(m, seconds=round(m.seconds, 6)) for m in measured),
    )


def _processor() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="bloom-7b1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--blocks", type=int, default=3, help="how many to load and measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file to write; without it, standard output")
    given = parser.parse_args()
    result = asyncio.run(measure(given.shape, given.dtype, given.blocks, given.threads, given.rounds))
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
