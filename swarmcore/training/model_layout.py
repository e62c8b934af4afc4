"""Where an adapter can be attached to a model: its projections and the shapes of its keys and values.

All of it follows from the config: the model is built on the ``meta`` device, where tensors take no memory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

import attrs
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarmcore.errors import AdapterError, SpanError
from swarmcore.executor.torch.partial_model import build_on_meta, find_base, layer_list
from swarmcore.types import Span

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer of the blocks."""

_BLOCK = re.compile(r"(?P<list>.+)\.(?P<block>\d+)\.(?P<module>.+)")


@attrs.frozen
class Projection:
    """A linear layer of a block."""

    block: int
    module: str
    """Its path inside of the block, such as ``self_attn.q_proj``."""
    inputs: int
    outputs: int
    transposed: bool
    """Whether its weight is stored ``[inputs, outputs]``, as GPT-2's are."""

    @property
    def name(self) -> str:
        """As on the wire: ``<block>.<module>``."""
        return f"{self.block}.{self.module}"


@attrs.frozen
class ModelLayout:
    """The blocks of a model, as far as adapters go."""

    model_type: str
    block_list: str
    """Path of the list of blocks in the causal language model, such as ``model.layers``."""
    blocks: int
    hidden_size: int
    projections: tuple[Projection, ...]
    """Of all blocks, in order."""
    other_modules: frozenset[str]
    """Paths inside of the blocks at which something else than a projection is."""
    kv_shape: tuple[int, int] | None
    """Key heads and head size of every block; None where keys and values differ in size."""
    repeats_keys: bool
    """Whether Transformers keeps each key once for every query head that reads it, where servers keep one."""

    @classmethod
    def of(cls, model_config: Any) -> ModelLayout:
        """Of the model with this Transformers config.

        Raise `AdapterError` for a config without blocks, such as that of `RemoteModel.config`, and
        `UnsupportedModelError` for a model that Transformers does not know.
        """
        config = model_config.get_text_config(decoder=True)
        if config.num_hidden_layers < 1:
            raise AdapterError(
                "the config has no blocks; pass the config of the whole model, RemoteModel.whole_config"
            )
        model = build_on_meta(config)
        base_path, base = find_base(model)
        path = f"{base_path}.{layer_list(base)}"
        blocks = getattr(base, layer_list(base))
        projections, others = [], set()
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    sizes, transposed = (module.in_features, module.out_features), False
                elif isinstance(module, Conv1D):
                    sizes, transposed = tuple(module.weight.shape), True
                else:
                    others.add(name)
                    continue
                projections.append(Projection(index, name, *sizes, transposed=transposed))
        return cls(
            model_type=config.model_type,
            block_list=path,
            blocks=len(blocks),
            hidden_size=config.hidden_size,
            projections=tuple(projections),
            other_modules=frozenset(others),
            kv_shape=_kv_shape(config),
            repeats_keys=config.model_type == "falcon" and config.new_decoder_architecture,
        )

    def span(self, span: Span | None) -> Span:
        """``span``, or all blocks. Raise `SpanError` for blocks that the model does not have."""
        span = span or Span(0, self.blocks)
        if not Span(0, self.blocks).covers(span):
            raise SpanError(f"there are no blocks {span} in a model with {self.blocks} blocks")
        return span

    def key(self, projection: Projection) -> str:
        """Path of a projection in the causal language model."""
        return f"{self.block_list}.{projection.name}"

    def select(self, targets: str | Collection[str], blocks: Collection[int]) -> tuple[Projection, ...]:
        """The projections of ``blocks`` that are meant by ``targets``, as PEFT's ``target_modules`` does.

        Names match whole paths or their last parts (``q_proj``, ``self_attn.q_proj``); a string is a regular
        expression for whole paths in the causal language model, or ``"all-linear"``. Raise `AdapterError`
        when nothing is found for one of them, and for modules that are no linear layers.
        """
        candidates = [projection for projection in self.projections if projection.block in blocks]
        if isinstance(targets, str):
            chosen = self._matching(targets, candidates)
            if not chosen:
                raise self._not_found(targets)
            return tuple(chosen)
        if not targets:
            raise AdapterError(f"no targets were named; {self._what_there_is()}")
        for target in targets:
            if not any(_matches(self.key(projection), target) for projection in candidates):
                raise self._not_found(target)
        return tuple(p for p in candidates if any(_matches(self.key(p), target) for target in targets))

    def find(self, key: str) -> Projection | None:
        """The projection that a file calls ``key``: its path in this model, in the base model alone, or in a
        larger model around it."""
        match = _BLOCK.fullmatch(key)
        if match is None:
            return None
        short = self.block_list.rpartition(".")[2]
        path = match["list"]
        if path not in (self.block_list, short) and not path.endswith(f"language_model.{short}"):
            return None
        return self._by_name.get(f"{int(match['block'])}.{match['module']}")

    @functools.cached_property
    def _by_name(self) -> dict[str, Projection]:
        return {projection.name: projection for projection in self.projections}

    def _matching(self, pattern: str, candidates: list[Projection]) -> list[Projection]:
        if pattern.lower() == ALL_LINEAR:
            return candidates
        try:
            wanted = re.compile(pattern)
        except re.error as exc:
            raise AdapterError(f"{pattern!r} is no regular expression: {exc}") from exc
        return [projection for projection in candidates if wanted.fullmatch(self.key(projection))]

    def _not_found(self, target: str) -> AdapterError:
        found = [
            name for name in self.other_modules if name and _matches(f"{self.block_list}.0.{name}", target)
        ]
        why = "is no linear layer" if found else "is no projection of these blocks"
        return AdapterError(f"target {target!r} {why}; {self._what_there_is()}")

    def _what_there_is(self) -> str:
        names = dict.fromkeys(projection.module for projection in self.projections)
        return f"a block of {self.model_type} has {', '.join(names)}"


def _matches(key: str, target: str) -> bool:
    return key == target or key.endswith(f".{target}")


def _kv_shape(config: Any) -> tuple[int, int] | None:
    if getattr(config, "is_heterogeneous", False):
        return None
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if getattr(config, "kv_lora_rank", None) or config.model_type == "diffllama":
        return None
    if config.model_type == "falcon":  # its head count is a list of three styles, not one number
        if config.new_decoder_architecture:
            return int(config.num_kv_heads), size
        return (1 if config.multi_query else heads), size
    return int(getattr(config, "num_key_value_heads", None) or heads), size
