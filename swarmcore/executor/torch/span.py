"""A span of blocks: the family's own base model, cut to the span and emptied of everything else."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.quantized import check_plain, unexpected_tensors
from swarmcore.errors import CheckpointError, SpanError, SwarmError, UnsupportedModelError
from swarmcore.executor.torch.attention import NAME, computing
from swarmcore.executor.torch.batch import AdapterUpdates, Attention, AttentionBatch
from swarmcore.executor.torch.cache_pages import CacheLayout, LayerShape
from swarmcore.executor.torch.device import loading_memory
from swarmcore.executor.torch.families import OWN_MASKS, attention_replacement
from swarmcore.executor.torch.masks import PROBE
from swarmcore.executor.torch.packed_linear import pack_linears
from swarmcore.executor.torch.partial_model import (
    build_on_meta,
    check_servable,
    cut_class,
    cut_config,
    layer_list,
    load_state,
    misshapen,
    whole_config,
)
from swarmcore.executor.torch.quantized_layers import quantize
from swarmcore.executor.torch.quantized_matrix import ExactMatrix
from swarmcore.executor.torch.self_test import check_span
from swarmcore.executor.torch.structure import Structure, structure_of
from swarmcore.executor.torch.tensor_names import is_computed, text_tower, whole_numbers
from swarmcore.resources.allocator import give_back_memory
from swarmcore.types import Progress, Span


class SpanModel:
    """Blocks ``span`` of a model, ready to run."""

    def __init__(
        self,
        base: Any,
        span: Span,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        weights: str | None = None,
    ) -> None:
        self.span = span
        self.weights = weights
        """What those of its products are rounded to; None where they are in ``dtype``."""
        self.origin = span.start
        """The block that its layers' numbers count from."""
        self.max_positions = fixed_positions(base.config)
        """Where the rotary embedding begins to depend on the length of the whole sequence; None: never."""
        self._base, self._name = base, name
        self._parts = {span: base}
        self._takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
        self.layout = CacheLayout(self._probe(device, dtype), dtype, device)

    def forward(self, hidden: torch.Tensor, batch: AttentionBatch, part: Span | None = None) -> torch.Tensor:
        """Hidden states ``[1, tokens, hidden size]`` through all blocks, or through ``part`` of them."""
        positions = {"position_ids": batch.position_ids} if self._takes_positions else {}
        with computing(batch):
            output = self._part(part or self.span)(inputs_embeds=hidden, use_cache=False, **positions)
        result: torch.Tensor = output.last_hidden_state
        return result

    def block(self, number: int) -> nn.Module:
        """Block ``number`` of the whole model."""
        block: nn.Module = getattr(self._base, layer_list(self._base))[number - self.span.start]
        return block

    def keep(self, part: Span) -> SpanModel:
        """The same modules for the blocks ``part`` alone; the others are freed when this object is."""
        kept = copy.copy(self)
        first = part.start - self.span.start
        kept.span, kept.layout = part, self.layout.part(first, first + len(part))
        kept._base = self._part(part)
        kept._parts = {part: kept._base}
        return kept

    def _part(self, part: Span) -> Any:
        """The base model with the blocks ``part`` only: the same modules under another list and config."""
        if part not in self._parts:
            inner = Span(part.start - self.span.start, part.end - self.span.start)
            layers = layer_list(self._base)
            base = copy.copy(self._base)
            base._modules = dict(self._base._modules)
            base.config = cut_config(self._base.config, inner)
            base.config._attn_implementation = NAME
            setattr(base, layers, nn.ModuleList(getattr(self._base, layers)[inner.start : inner.end]))
            self._parts[part] = base
        return self._parts[part]

    def _probe(self, device: torch.device, dtype: torch.dtype) -> tuple[LayerShape, ...]:
        """Run one token, to learn the shapes of the caches and to refuse here what would go wrong later."""
        config = self._base.config
        hidden = torch.randn(1, 1, config.hidden_size, dtype=dtype, device=device)
        probe = _Probe(torch.zeros(1, 1, dtype=torch.long, device=device))
        layers = layer_list(self._base)
        blocks = getattr(self._base, layers)
        try:
            if config.model_type not in OWN_MASKS:
                config._attn_implementation = PROBE
            self.forward(hidden, probe)
            config._attn_implementation = NAME
            setattr(self._base, layers, nn.ModuleList())
            unchanged = self.forward(hidden, probe)
        except SwarmError as exc:
            raise UnsupportedModelError(f"{self._name} ({config.model_type}): {exc}") from exc
        except Exception as exc:
            raise UnsupportedModelError(
                f"the blocks of {self._name} ({config.model_type}) cannot be run on their own: {exc!r}"
            ) from exc
        finally:
            setattr(self._base, layers, blocks)
        if not torch.equal(hidden, unchanged):
            raise UnsupportedModelError(
                f"{self._name} ({config.model_type}) changes hidden states outside of its blocks"
            )
        if sorted(probe.shapes) != list(range(len(self.span))):
            raise UnsupportedModelError(
                f"{self._name} ({config.model_type}) has blocks that do not attend through transformers' "
                f"AttentionInterface; this family needs an attention of its own"
            )
        return tuple(probe.shapes[index] for index in sorted(probe.shapes))


class _Probe:
    """A batch that attends to nothing and notes what each layer would store."""

    def __init__(self, position_ids: torch.Tensor) -> None:
        self.position_ids = position_ids
        self.origin = 0
        self.shapes: dict[int, LayerShape] = {}
        self.updates: AdapterUpdates | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        if layer in self.shapes:
            raise UnsupportedModelError("a block attends twice")
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        _, heads, tokens, _ = query.shape
        return query.new_zeros(1, tokens, heads, value.shape[3])


def load_span(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights: str | None = None,
    progress: Progress | None = None,
) -> SpanModel:
    """Read the tensors of ``span`` and make a model of them. Blocks for as long as that takes.

    ``weights`` is what those of linear layers and experts are rounded to (`quantized_matrix.MATRICES`), block
    by block as they are read: no more than one block is in memory in another form than it stays in.

    Before that, `self_test` has it tried in small. Raise `SpanError` for blocks that the model does not have,
    `UnsupportedModelError` for a family that cannot be served or does not pass, `CheckpointError` for missing
    or misshapen tensors, `InputError` when memory runs out, and what `Checkpoint.read` raises.
    """
    with loading_memory(checkpoint.name):
        check_blocks(checkpoint, span, quantized=weights is not None)
        loaded = _load(checkpoint, span, dtype, device, weights, progress)
    give_back_memory()
    return loaded


def check_blocks(checkpoint: Checkpoint, span: Span, *, quantized: bool = False) -> None:
    """Raise `UnsupportedModelError` when these blocks fail the self-test. Looks at the config alone.

    With ``quantized`` they are tried in layers for quantised weights, on weights that are exact.
    """
    weights = ExactMatrix.kind if quantized else None
    check_span(checkpoint, span, functools.partial(_load_small, weights=weights), how=weights)


def _load_small(checkpoint: Checkpoint, span: Span, weights: str | None = None) -> SpanModel:
    return _load(checkpoint, span, torch.float32, torch.device("cpu"), weights, None)


def _load(
    checkpoint: Checkpoint,
    span: Span,
    dtype: torch.dtype,
    device: torch.device,
    weights: str | None,
    progress: Progress | None,
) -> SpanModel:
    name = checkpoint.name
    text = checkpoint.config.get_text_config(decoder=True)
    if not Span(0, text.num_hidden_layers).covers(span):
        raise SpanError(f"blocks {span} are not in {name}, which has blocks 0:{text.num_hidden_layers}")
    check_servable(text, name)
    structure, empty = structure_of(text), build_on_meta(whole_config(text))
    names = _block_tensors(checkpoint, structure, span)
    one_by_one = weights is not None or checkpoint.stored_weights is not None
    parts = [Span(block, block + 1) for block in span] if one_by_one else [span]
    report = _Progress(progress, checkpoint.nbytes(names))
    bases = []
    for part in parts:
        inner = {key: place for key, place in names.items() if place[0] in part}
        base = _load_base(checkpoint, structure, empty, part, inner, dtype, report)
        base.to(device)
        if weights is not None:
            for index, block in enumerate(getattr(base, layer_list(base))):
                quantize(block, weights, f"block {part.start + index} of {name}")
        pack_linears(base)
        bases.append(base)
    base = _joined(bases, whole_config(text), span)
    if weights is not None:
        base.config._experts_implementation = "eager"  # one after the other
    if replace := attention_replacement(text.model_type):
        replace(base)
    return SpanModel(base, span, name, device, dtype, weights)


def _load_base(
    checkpoint: Checkpoint,
    structure: Structure,
    empty: Any,
    span: Span,
    names: dict[str, tuple[int, str]],
    dtype: torch.dtype,
    progress: Progress,
) -> Any:
    """The family's base model with the blocks ``span`` alone, whose tensors are ``names``.

    ``empty`` is the whole model, without memory.
    """
    name, whole = checkpoint.name, whole_config(checkpoint.config.get_text_config(decoder=True))
    blocks_path = f"{structure.base}.{structure.layers}"
    tensors = checkpoint.read(names, progress=progress)
    tensors = {key: data for key, data in tensors.items() if not is_computed(key, data)}
    integers = {key for key, data in empty.state_dict().items() if not data.is_floating_point()}
    check_plain(name, tensors, whole_numbers(tensors, integers))
    state = {
        f"{blocks_path}.{index - span.start}.{rest}": tensors.pop(key)
        for key, (index, rest) in names.items()
        if key in tensors
    }
    family = cut_class(type(empty), structure.base, structure.layers, span)
    model, report = load_state(family, whole, state, dtype, name)
    if unexpected := [key for key in report["unexpected_keys"] if not is_computed(key)]:
        raise unexpected_tensors(name, unexpected)
    for key, found, expected in report.get("mismatched_keys", ()):
        raise misshapen(name, _in_whole_model(key, blocks_path, span), found, expected)
    wrong = [key for key in report["missing_keys"] if key.startswith(f"{blocks_path}.")]
    if wrong:
        raise CheckpointError(
            f"blocks {span} of {name} lack {len(wrong)} tensors, such as "
            f"{_in_whole_model(wrong[0], blocks_path, span)}; the checkpoint is incomplete or not the one "
            f"its config describes"
        )
    base = model.get_submodule(structure.base)
    _keep_only_blocks(base, structure)
    base.config._attn_implementation = NAME
    return base.eval().requires_grad_(False)


def _joined(bases: list[Any], whole: Any, span: Span) -> Any:
    """One base model of all blocks of ``bases``, which have one each."""
    base, layers = bases[0], layer_list(bases[0])
    if len(bases) == 1:
        return base
    config = cut_config(whole, span)
    config._attn_implementation = NAME
    blocks = nn.ModuleList()
    for index, part in enumerate(bases):
        [block] = getattr(part, layers)
        for module in block.modules():
            if getattr(module, "config", None) is part.config:
                module.config = config
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx += index
        blocks.append(block)
    setattr(base, layers, blocks)
    base.config = config
    return base


class _Progress:
    """Of several readings, as one."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._before = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, min(self._before + done, self._total), self._total)
        if done >= total:
            self._before += total


def _block_tensors(checkpoint: Checkpoint, structure: Structure, span: Span) -> dict[str, tuple[int, str]]:
    """The checkpoint's tensors of the span, with the block each belongs to and its name in there."""
    tower = re.escape(text_tower(checkpoint, structure))
    pattern = re.compile(rf"{tower}{structure.layers}\.(\d+)\.(.+)")
    matches = ((name, pattern.fullmatch(name)) for name in checkpoint.names())
    return {name: (int(match[1]), match[2]) for name, match in matches if match and int(match[1]) in span}


def _in_whole_model(key: str, blocks_path: str, span: Span) -> str:
    """What a tensor of the cut model is called in the whole one."""
    index, _, rest = key.removeprefix(f"{blocks_path}.").partition(".")
    return f"{blocks_path}.{int(index) + span.start}.{rest}"


def _keep_only_blocks(base: Any, structure: Structure) -> None:
    """Take out embeddings and final norm: hidden states come in and go out as they are between blocks."""
    tokens = base.get_input_embeddings()
    for name, child in list(base.named_children()):
        if name in structure.after or (name != structure.layers and any(True for _ in child.parameters())):
            positional = isinstance(child, nn.Embedding) and child is not tokens
            setattr(base, name, _NoPositions() if positional else _Unchanged())
    if hasattr(base, "embedding_multiplier"):
        base.embedding_multiplier = (
            1.0  # Granite scales what it takes for embeddings; the client has done so.
        )


class _Unchanged(nn.Module):
    """In place of what comes before the first block or after the last: gives back the tensor it is given."""

    def forward(self, *args: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        return next(given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor))


class _NoPositions(nn.Module):
    """In place of learned position embeddings, which the client has added: adds nothing, in any dtype."""

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return torch.zeros((), device=next(given).device)


def fixed_positions(config: Any) -> int | None:
    """Up to which length rotary frequencies are the same for all lengths.

    Dynamic and long rope change them for the whole sequence, cached keys included, once it outgrows the
    length the model was trained at; results would then depend on how the sequence was cut into steps.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if "dynamic" in kind.get("rope_type", "")
        or (kind.get("rope_type") == "longrope" and kind.get("short_factor") != kind.get("long_factor"))
    ]
    return min(limits, default=None)
