"""What weights in fewer bits cost and save, beside bfloat16: speed, memory, quality.

Times are of the CPU, medians of turns that the kinds of weights take one after the other, of one thread.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import attrs
import torch
from rich.table import Table
from torch import nn

from swarmcore.checkpoint import Checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import InputError
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.quantized_matrix import MATRICES, choose_weights
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.span import SpanModel, load_span
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.resources.allocator import give_back_memory, use_one_arena
from swarmcore.types import Span

CPU = torch.device("cpu")
KINDS = ("bf16", "int8", "int4", "nf4")
SESSIONS = (1, 4, 16, 64)
CONTEXT = 16
"""Tokens cached before a decode step."""


def load(checkpoint: Checkpoint, span: Span, kind: str) -> SpanModel:
    weights = choose_weights(kind, None, CPU)
    return load_span(checkpoint, span, dtype=torch.bfloat16, device=CPU, weights=weights)


def speed(checkpoint: Checkpoint, span: Span, turns: int = 7) -> dict[str, dict[str, float]]:
    """Seconds by what is done and the kind of weights."""
    models = {kind: load(checkpoint, span, kind) for kind in KINDS}
    size = checkpoint.info.hidden_size
    found: dict[str, dict[str, float]] = {}

    def take_turns(what: str, run: Callable[[str], None]) -> None:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(turns):
            for kind in KINDS:
                began = time.thread_time()
                run(kind)
                times[kind].append(time.thread_time() - began)
        found[what] = {kind: median(each[1:]) for kind, each in times.items()}

    with torch.inference_mode():
        for sessions in SESSIONS:
            caches = {kind: [SequenceCache(models[kind].layout) for _ in range(sessions)] for kind in KINDS}
            for kind in KINDS:
                rows = torch.randn(1, sessions * CONTEXT, size).bfloat16()
                models[kind].forward(rows, RaggedBatch([(cache, 0, CONTEXT) for cache in caches[kind]], CPU))
            rows = torch.randn(1, sessions, size).bfloat16()

            def decode(
                kind: str, rows: torch.Tensor = rows, caches: dict[str, list[SequenceCache]] = caches
            ) -> None:
                batch = RaggedBatch([(cache, CONTEXT, 1) for cache in caches[kind]], CPU)
                models[kind].forward(rows, batch)

            take_turns(f"decode, {sessions} sessions", decode)
        prompt = torch.randn(1, 512, size).bfloat16()
        take_turns(
            "prefill of 512",
            lambda kind: void(
                models[kind].forward(prompt, RaggedBatch([(SequenceCache(models[kind].layout), 0, 512)], CPU))
            ),
        )
    leaf = torch.randn(1, 128, size).bfloat16().requires_grad_()

    def both(kind: str) -> None:
        output = models[kind].forward(leaf, UncachedBatch((128,), CPU))
        torch.autograd.grad(output, leaf, torch.ones_like(output))

    take_turns("forward and backward, 128", both)
    return found


def void(result: object) -> None:
    del result


@attrs.frozen
class MemoryUse:
    """Resident bytes of a process."""

    before: int
    """With all libraries, and without the blocks."""
    loaded: int
    """With the blocks."""
    most: int
    """While they were loaded."""


def memory(checkpoint: Checkpoint, span: Span, kind: str) -> MemoryUse:
    """What the blocks take of this process, which has no threads yet. Raise `InputError` but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is measured on Linux only")
    use_one_arena()  # as a server does
    load(checkpoint, Span(0, 1), kind)  # libraries, and the self-test
    gc.collect()
    give_back_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = load(checkpoint, span, kind)
    gc.collect()
    after = _status("VmRSS")
    del model
    return MemoryUse(before, after, _status("VmHWM"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def quality(checkpoint: Checkpoint, tokens: int = 2048, rows: int = 512) -> dict[tuple[str, bool], float]:
    """Perplexity on a chapter of Python's reference, by the kind of weights and whether they were shuffled.

    Their columns then are while they are rounded, so that no grid is found that they were on before.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(topics["execmodel"]).input_ids[:tokens]
    parts, span = LocalParts.load(checkpoint, dtype="float32"), checkpoint.info.span
    found = {}
    for kind, shuffled in [("bf16", False)] + [(kind, by) for by in (False, True) for kind in KINDS[1:]]:
        model = load_span(checkpoint, span, dtype=torch.float32, device=CPU)
        for block in span if kind != "bf16" else ():
            for layer in model.block(block).modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(_rounded(layer.weight, kind, shuffled))
        lost = count = 0.0
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows]
            hidden = parts.embed(part, range(len(part)))
            with torch.inference_mode():
                output = model.forward(hidden[None], UncachedBatch((len(part),), CPU))[0]
            logits = parts.logits(output)[:-1]
            lost += float(nn.functional.cross_entropy(logits, torch.tensor(part[1:]), reduction="sum"))
            count += len(part) - 1
        found[kind, shuffled] = math.exp(lost / count)
    return found


def _rounded(weight: torch.Tensor, kind: str, shuffled: bool) -> torch.Tensor:
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    order = order if shuffled else torch.arange(columns)
    plain = torch.empty_like(weight)
    plain[:, order] = MATRICES[kind](weight[:, order].contiguous(), kind).dense()
    return plain


def speed_table(found: dict[str, dict[str, float]]) -> Table:
    """The figures as people read them: the time with plain weights, and the others' speed beside it."""
    table = Table("", "bf16, ms", *KINDS[1:])
    for what, times in found.items():
        ratios = (f"{times['bf16'] / times[kind]:.2f}" for kind in KINDS[1:])
        table.add_row(what, f"{1000 * times['bf16']:.1f}", *ratios)
    return table


def memory_table(found: dict[str, MemoryUse]) -> Table:
    """The figures as people read them, in MB."""
    table = Table("", "before", "with the blocks", "most meanwhile")
    for kind, use in found.items():
        table.add_row(kind, *(f"{each / 2**20:.0f}" for each in attrs.astuple(use)))
    return table


def quality_table(found: dict[tuple[str, bool], float]) -> Table:
    """The figures as people read them: perplexity, and as a ratio to that of plain weights."""
    table = Table("", "columns", "perplexity", "ratio")
    for (kind, shuffled), value in found.items():
        how = "shuffled" if shuffled else "as they are"
        table.add_row(kind, how, f"{value:.3f}", f"{value / found['bf16', False]:.4f}")
    return table
