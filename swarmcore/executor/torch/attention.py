"""The hook into transformers: the attention of every layer hands its queries, keys and values to the batch.

Families of the regular kind look their attention function up in ``AttentionInterface``, by the name in the
config. Ours is registered there; since it has no mask function, transformers builds no masks. Which batch is
being computed is known per thread, because what a model's ``forward`` passes down differs between families.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from swarmcore.errors import InternalError, UnsupportedModelError
from swarmcore.executor.torch.batch import Attention, Batch

NAME = "swarmcore_ragged"
"""Our function's name in ``AttentionInterface``."""

_IGNORED = frozenset(
    {
        "attention_mask",
        "dropout",
        "is_causal",
        "output_attentions",
        "position_ids",
        "position_embeddings",
        "use_cache",
    }
    | {
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "is_sliding",
        "is_local",
    }
)
"""What layers pass along that does not change the result here."""


class _Current(threading.local):
    batch: Batch | None = None


_current = _Current()


@contextmanager
def computing(batch: Batch) -> Iterator[None]:
    """Within it, the layers that this thread runs attend through ``batch``."""
    _current.batch = batch
    try:
        yield
    finally:
        _current.batch = None


def current_batch() -> Batch:
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: ``[1, heads, tokens, size]`` in, ``[1, tokens, heads, size]`` out."""
    batch = current_batch()
    if others.keys() - _IGNORED:
        unknown = sorted(name for name in others.keys() - _IGNORED if others[name] is not None)
        if unknown:
            raise UnsupportedModelError(f"its attention needs {', '.join(unknown)}, which is not served yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = Attention(scale, sliding_window, softcap, s_aux)
    layer: Any = module.layer_idx
    return batch.attend(layer, query, key, value, how), None


AttentionInterface.register(NAME, ragged_attention)
