"""How far executors, weights and caches of several kinds differ in what a model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import attrs
import torch
from rich.table import Table

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import InputError, SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.loader import BlockLoader, LoadSettings, open_loader
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.routing.step_codec import STEP_CODECS

WAYS = (
    "torch dtype=float32",
    "torch dtype=float32 cache_dtype=int8",
    "torch",
    "torch cache_dtype=int8",
    "torch weights=int8",
    "ggml",
    "torch + ggml",
    "ggml rows=32",
    "torch codec=int8 + torch codec=int8 + torch codec=int8",
)
ROWS = 256
"""That are taken at a time, where a way does not say."""
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
    model: str, ways: Sequence[str] = WAYS, *, tokens: int = 1024, threads: int = 1
) -> list[Difference]:
    """Compare predictions over the first ``tokens`` of `TEXT`, embedded and read by the client in float32.

    A way is an executor's name and, after it, fields of `LoadSettings`, as in ``torch weights=int8``; with
    ``+`` between several, blocks are shared out among them. ``rows`` are taken at a time, `ROWS` if it does
    not say; ``codec`` is that of the link to the server, and from the last one back.

    Raise `InputError` for a way of another form.
    """
    parsed = [_parse(way) for way in ways]
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(TEXT).input_ids[: tokens + 1]
    parts = LocalParts.load(checkpoint, dtype="float32")
    embedded = parts.embed(ids[:-1], range(len(ids) - 1))
    expected = torch.tensor(ids[1:])
    found, first = [], None
    for way, (servers, rows) in zip(ways, parsed, strict=True):
        loaders = [
            open_loader(server.executor, LoadSettings(model=model, threads=threads, **server.options))
            for server in servers
        ]
        codecs = [server.codec for server in servers]
        numerics, hidden = await _through(loaders, codecs, embedded, rows)
        predicted = torch.log_softmax(parts.logits(hidden), dim=-1)
        first = predicted if first is None else first
        found.append(_difference(way, numerics, first, predicted, expected))
    return found


@attrs.frozen
class _Server:
    executor: str
    codec: str
    options: dict[str, Any]
    """Fields of `LoadSettings`."""


def _parse(way: str) -> tuple[list[_Server], int]:
    """The servers that ``way`` names, and how many rows are taken at a time."""
    known = {field.name for field in attrs.fields(LoadSettings)} - {"model", "threads"}
    servers, rows = list[_Server](), ROWS
    for part in way.split("+"):
        name, *pairs = part.split() or [""]
        options: dict[str, Any] = {}
        codec = "raw"
        for field, _, value in (pair.partition("=") for pair in pairs):
            if field == "rows" and value.isdecimal() and int(value):
                rows = int(value)
            elif field == "codec" and value in STEP_CODECS:
                codec = value
            elif field in known and value:
                options[field] = value
            else:
                name = ""
        if not name:
            raise InputError(
                f"{way!r} is no way to compute: an executor's name, and after it fields such as weights=int8 "
                f"(rows, codec, {', '.join(sorted(known))})"
            )
        servers.append(_Server(name, codec, options))
    return servers, rows


async def _through(
    loaders: Sequence[BlockLoader], codecs: Sequence[str], embedded: torch.Tensor, rows: int
) -> tuple[tuple[str, ...], torch.Tensor]:
    spans = loaders[0].model.span.split(len(loaders))
    chain = [loader.load(span) for loader, span in zip(loaders, spans, strict=True)]
    try:
        return tuple(str(each.numerics) for each in chain), await _prefill(chain, codecs, embedded, rows)
    finally:
        for each in chain:
            await each.close()


async def _prefill(
    chain: Sequence[BlockExecutor], codecs: Sequence[str], embedded: torch.Tensor, rows: int
) -> torch.Tensor:
    sequence, outputs = SequenceId(0), []
    for executor in chain:
        executor.reserve(sequence, -(-len(embedded) // executor.page) * executor.page)
    for start in range(0, len(embedded), rows):
        part = embedded[start : start + rows]
        hidden = to_wire("hidden", part)
        for executor, codec in zip(chain, codecs, strict=True):
            hidden = hidden.encode(codec).decode()
            chunk = ScheduledChunk(hidden, 0, executor.span, (Segment(sequence, start, len(part)),))
            (result,) = await executor.step([chunk])
            if isinstance(result, SwarmError):
                raise result
            hidden = result
        outputs.append(to_torch(hidden.encode(codecs[-1]).decode()).float())
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


def numerics_table(results: Sequence[Difference]) -> Table:
    """The figures as people read them."""
    table = Table("", "numerics", "perplexity", "same token", "divergence", "lead where not")
    for each in results:
        figures = f"{each.perplexity:.2f}", f"{each.same:.1%}", f"{each.divergence:.4f}", f"{each.margin:.2f}"
        table.add_row(each.way, ", ".join(each.numerics), *figures)
    return table
