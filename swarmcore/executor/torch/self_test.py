"""The numeric self-test: a span is served only when it computes what the family's own model does.

It is made on a small random model of the checkpoint's kind (`Reference`), so that it takes a moment and no
memory to speak of, whatever the size of the model. The span of it is loaded as any other and takes two
sequences in ragged batches (prefill, chunks, decode steps, past every window); what comes out of each block
is compared with the whole model of transformers. All of it depends on the config alone, so a test that was
passed is remembered for this config and these versions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.storage import cache_folder, write_file
from swarmcore.distribution import version
from swarmcore.errors import SpanError, UnsupportedModelError
from swarmcore.executor.torch.batch import AttentionBatch
from swarmcore.executor.torch.cache_pages import CacheLayout
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.partial_model import check_servable
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.reference import LENGTHS, Reference
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.types import Span

TOLERANCE = 1e-3
"""Largest difference, in standard deviations of what is compared. Rounding makes 1e-5."""

_KEPT_BYTES = 4 * 2**20
"""A reference of at most that size stays in memory, for the next span of the same model."""

STEPS = (
    ((0, 0, 5), (1, 0, 3)),
    ((1, 3, 6),),
    ((1, 6, 9), (0, 5, 11)),
    ((0, 11, 12), (1, 9, 10)),
    ((0, 12, 13),),
)

_remembered: set[str] = set()
_reference: tuple[str, Reference] | None = None
_one_at_a_time = threading.Lock()


class Blocks(Protocol):
    """A span that was loaded, as far as it is tested."""

    layout: CacheLayout

    def block(self, number: int) -> nn.Module: ...

    def forward(self, hidden: torch.Tensor, batch: AttentionBatch) -> torch.Tensor: ...


def check_span(
    checkpoint: Checkpoint,
    span: Span,
    load: Callable[[Checkpoint, Span], Blocks],
    *,
    how: str | None = None,
) -> None:
    """Raise `UnsupportedModelError` when ``span``, as ``load`` makes it, computes other than the whole model.

    ``load`` is given a small checkpoint of the same kind, to be loaded in float32 on the CPU; ``how`` is
    what is special about it. Returns at once when this test has been passed before.
    """

    def test(reference: Reference) -> str | None:
        return _difference(reference, span, load(reference, span))

    check(checkpoint, f"blocks {span} ({how} weights)" if how else f"blocks {span}", test)


def check(checkpoint: Checkpoint, part: str, test: Callable[[Reference], str | None]) -> None:
    """Have ``part`` of a model tested, unless that was done before with these versions.

    ``test`` says what differs from the reference. Raise `UnsupportedModelError` when something does, and for
    what the config alone rules out.
    """
    global _reference
    check_servable(checkpoint.config.get_text_config(decoder=True), checkpoint.name)
    config = {key: value for key, value in checkpoint.config.to_dict().items() if key != "_name_or_path"}
    model = _key(config, *_versions())  # wherever the checkpoint lies
    passed = _key(model, part)
    record = cache_folder() / "tested" / passed
    with _one_at_a_time:
        if passed in _remembered:
            return
        if not record.is_file():
            if _reference is None or _reference[0] != model:
                _reference = None  # its memory first
                _reference = model, Reference(checkpoint)
            try:
                difference = test(_reference[1])
            except (UnsupportedModelError, SpanError):
                raise
            except Exception as exc:  # any code of the family's, and nothing that this checkpoint lacks
                raise UnsupportedModelError(
                    f"{checkpoint.name} ({_reference[1].config.model_type}) cannot be tested, and is not "
                    f"served untested: {part} of a small model of its kind fail with {exc!r}"
                ) from exc
            if difference:
                raise UnsupportedModelError(
                    f"{checkpoint.name} ({_reference[1].config.model_type}) is not served: its {part} would "
                    f"differ from what transformers {transformers.__version__} computes: {difference}"
                )
            if _reference[1].nbytes(_reference[1].names()) > _KEPT_BYTES:
                _reference = None
            with contextlib.suppress(OSError):  # then it is tested again next time
                write_file(record, b"")
        _remembered.add(passed)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of all that takes part in a test; of our own code its hash, which a clone changes more often."""
    code = hashlib.sha256()
    package = Path(__file__).parents[2]
    for part in ("checkpoint", "executor/torch", "client/generation"):
        for file in sorted(package.glob(f"{part}/**/*.py")):
            code.update(file.read_bytes())
    return version(), code.hexdigest(), torch.__version__, transformers.__version__


@torch.inference_mode()
def _difference(reference: Reference, span: Span, blocks: Blocks) -> str | None:
    caches = [SequenceCache(blocks.layout) for _ in LENGTHS]
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}
    for step in STEPS:
        batch = RaggedBatch(
            [(caches[number], start, end - start) for number, start, end in step], torch.device("cpu")
        )
        outputs = _outputs(reference, span, blocks, step, batch)
        for block, rows in outputs.items():
            for (number, _, _), part in zip(step, torch.split(rows, batch.counts), strict=True):
                seen.setdefault((block, number), []).append(part)
    for block in span:
        for number in range(len(LENGTHS)):
            if found := compare(
                torch.cat(seen[block, number]),
                reference.hidden[number][block + 1],
                reference.hidden[number][block],
            ):
                return f"block {block} is off by {found}"
    whole = UncachedBatch(LENGTHS, torch.device("cpu"))
    everything = [(number, 0, length) for number, length in enumerate(LENGTHS)]
    last = _outputs(reference, span, blocks, everything, whole)[span.end - 1]
    for hidden, rows in zip(reference.hidden, torch.split(last, list(LENGTHS)), strict=True):
        if found := compare(rows, hidden[span.end], hidden[span.start]):
            return f"a forward pass is off by {found}"
    return None


def _outputs(
    reference: Reference,
    span: Span,
    blocks: Blocks,
    step: Sequence[tuple[int, int, int]],
    batch: RaggedBatch | UncachedBatch,
) -> dict[int, torch.Tensor]:
    """What comes out of each block, ``[tokens, hidden size]``."""
    entering = torch.cat([reference.hidden[number][span.start][start:end] for number, start, end in step])
    found: dict[int, torch.Tensor] = {}

    def note(number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found[number] = (output if isinstance(output, torch.Tensor) else output[0])[0].clone()

    hooks = [blocks.block(number).register_forward_hook(functools.partial(note, number)) for number in span]
    try:
        found[span.end - 1] = blocks.forward(entering[None], batch)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return found


def compare(ours: torch.Tensor, expected: torch.Tensor, entering: torch.Tensor | None = None) -> str | None:
    """What is wrong with ``ours``, ``[tokens, size]``; None when it is ``expected`` but for rounding.

    ``entering`` is what was added to: the scale is that of what was done to it.
    """
    if ours.shape != expected.shape:
        return f"its shape: {list(ours.shape)}, not {list(expected.shape)}"
    change = expected if entering is None else expected - entering
    scale = change.std().clamp_min(1e-6)
    errors = (ours - expected).abs().amax(-1) / scale
    if bool((errors <= TOLERANCE).all()):  # no NaN passes
        return None
    token = int((~(errors <= TOLERANCE)).nonzero()[0])
    return f"{errors.max():.2g} standard deviations, from token {token} of {len(errors)} on"
