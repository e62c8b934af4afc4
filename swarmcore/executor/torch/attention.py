"""The hook into transformers: the attention of every layer hands its queries, keys and values to the batch.

Families of the regular kind look their attention function up in ``AttentionInterface``, by the name in the
config. Ours is registered there; under `NAME` there is no mask function, so transformers builds no masks, and
what a layer sees is what `masks` found when the span was loaded. Which batch is being computed is known per
thread, because what a model's ``forward`` passes down differs between families.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from swarmcore.errors import InternalError, UnsupportedModelError
from swarmcore.executor.torch.batch import Attention, AttentionBatch
from swarmcore.executor.torch.masks import BIDIRECTIONAL, FULL, PROBE, Mask, OtherMask

NAME = "swarmcore_ragged"
"""Our function's name in ``AttentionInterface``."""

_MASK = "swarmcore_mask"
"""The attribute of an attention module that keeps its `Mask`."""

_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",  # where a cache of transformers' would store
        "is_local",
        "is_sliding",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",  # for kernels that find packed sequences by them
        "return_dict",
        "sliding_window",  # for kernels that take no mask; the mask says the same
        "use_cache",
    }
)
"""What layers pass along that does not change the result of transformers' own ``sdpa`` and ``eager``."""


class _Current(threading.local):
    batch: AttentionBatch | None = None


_current = _Current()


@contextmanager
def computing(batch: AttentionBatch) -> Iterator[None]:
    """Within it, the layers that this thread runs attend through ``batch``."""
    _current.batch = batch
    try:
        yield
    finally:
        _current.batch = None


def current_batch() -> AttentionBatch:
    """The batch that this thread is computing."""
    if _current.batch is None:
        raise InternalError("a span was run outside of a batch")
    return _current.batch


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: ``[1, heads, tokens, size]`` in, ``[1, tokens, heads, size]`` out.

    Raise `UnsupportedModelError` for whatever would change the result and cannot be done here.
    """
    batch = current_batch()
    if attention_mask is not None:
        raise UnsupportedModelError("its layers make an attention mask of their own, which is not served")
    if unknown := sorted(name for name in others.keys() - _WITHOUT_EFFECT if others[name] is not None):
        raise UnsupportedModelError(f"its attention needs {', '.join(unknown)}, which is not served")
    if dropout:
        raise UnsupportedModelError("its attention drops out weights in inference, which is not served")
    mask = getattr(module, _MASK, FULL)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = Attention(scale, mask.window, mask.chunk, softcap, s_aux)
    layer: Any = module.layer_idx
    return batch.attend(layer, query, key, value, how).contiguous(), None  # as some families rely on


def probing_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | OtherMask | torch.Tensor | None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `ragged_attention`, keeping in ``module`` what its tokens see."""
    if attention_mask is None:
        # As transformers' sdpa decides where it is given no mask.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal:
            raise UnsupportedModelError(BIDIRECTIONAL)
        attention_mask = FULL
    if isinstance(attention_mask, OtherMask):
        raise UnsupportedModelError(attention_mask.why)
    if isinstance(attention_mask, Mask):
        setattr(module, _MASK, attention_mask)
        attention_mask = None
    return ragged_attention(module, query, key, value, attention_mask, **others)


AttentionInterface.register(NAME, ragged_attention)
AttentionInterface.register(PROBE, probing_attention)
