"""Attention by plain products and a softmax, for what no fused kernel does, or does slowly.

On CPUs torch's fused kernel goes over bfloat16 much more slowly than its products: these are faster from a
few hundred cached tokens on. Scores are rounded to the dtype of the queries, as in transformers' ``eager``;
with a soft cap, sinks or a bias they go on in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarmcore.executor.torch.batch import Attention
from swarmcore.executor.torch.cache_pages import Planes

BLOCK = 128
"""Tokens that attend together: few, so that little is computed which a causal mask hides."""

_SCORES = 1024 * 1024
"""Most scores that are held at a time: about as many as a core's own cache has room for."""


_WORTHWHILE = 350_000
_WORTHWHILE_ALONE = 50_000
"""Query values times keys from which on products are faster."""


def attend_to_pieces(
    query: torch.Tensor,
    pieces: Sequence[Planes],
    rows: int,
    how: Attention,
    *,
    mask: torch.Tensor | None = None,
    unseen: Sequence[tuple[int, int]] = (),
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ``query``, ``[key heads, rows of each * tokens, size]``, to keys and values in pieces.

    The columns of the scores are the rows of all pieces, in order. ``mask`` is added to the last columns,
    ``[key heads or 1, rows or 1, tokens, columns]``. Columns that are ``unseen`` (the first, how many) count
    for nothing, whatever their keys are. ``sinks`` are those of ``how``, ``[key heads, rows]``. The result is
    as ``query``.
    """
    parts = [_scores(query, piece, how.scale) for piece in pieces]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if how.explicit or how.bias is not None:
        scores = scores.float()
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        heads, stacked, columns = scores.shape
        masked = mask.shape[-1]
        by_token = scores.view(heads, rows, stacked // rows, columns)
        by_token.narrow(3, columns - masked, masked).add_(mask)
    for first, count in unseen:
        scores.narrow(2, first, count).fill_(float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sinks = sinks.to(scores.dtype).repeat_interleave(scores.shape[1] // rows, 1).unsqueeze(-1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    weights = weights.to(query.dtype)
    if len(pieces) == 1:
        return _weighted(weights, pieces[0])
    lengths = [piece[0].shape[1] for piece in pieces]
    split = weights.split_with_sizes(lengths, -1)
    return torch.stack([_weighted(*each) for each in zip(split, pieces, strict=True)]).sum(0)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    how: Attention,
    mask: Callable[[], torch.Tensor | None],
) -> torch.Tensor:
    """Attention of the tokens from position ``start`` on to keys and values of all that they see.

    ``query`` is ``[sequences, heads, count, size]``, and so is the result; keys and values begin with the
    position ``how.first_key(start)``. ``mask`` gives the `causal_mask`; called only where one is needed.
    """
    many, heads, count, size = query.shape
    kv_heads, length = keys.shape[1:3]
    rows = heads // kv_heads
    if how.explicit or (products_pay(query, query.numel() * length, rows) and (many == 1 or not how.bias)):
        sinks = None if how.sinks is None else how.sinks.view(kv_heads, rows).repeat(many, 1)
        grouped = query.reshape(many * kv_heads, rows, count, size)
        planes = keys.flatten(0, 1), values.flatten(0, 1)
        return _in_blocks(grouped, planes, start, how, mask, sinks).view(many, heads, count, -1)
    causal = start == 0 and not how.first_key(length - 1) and how.bias is None
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if causal else mask(),
        is_causal=causal,
        scale=how.scale,
        enable_gqa=heads > kv_heads,
    )


def products_pay(query: torch.Tensor, work: int, rows: int) -> bool:
    """Whether products are faster than the fused kernel, for query values times keys (``work``).

    ``rows`` query heads share a key head: the fused kernel is slower still where none do.
    """
    if query.dtype is not torch.bfloat16 or query.device.type != "cpu" or query.requires_grad:
        return False
    return work >= (_WORTHWHILE if rows > 1 else _WORTHWHILE_ALONE)


def _in_blocks(
    query: torch.Tensor,
    planes: Planes,
    start: int,
    how: Attention,
    mask: Callable[[], torch.Tensor | None],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Some tokens at a time, and to no more than they see.

    ``query``, and the result, are ``[key heads, rows of each, tokens, size]``.
    """
    heads, rows, count, _ = query.shape
    base = how.first_key(start)
    plain = how.window is None and how.chunk is None and how.bias is None
    whole = None if plain else mask()
    if whole is not None and whole.shape[1] > 1:
        whole = whole.view(heads, rows, *whole.shape[2:])
    outputs = []
    for at in range(0, count, BLOCK):
        tokens = min(BLOCK, count - at)
        first, end = how.first_key(start + at), start + at + tokens
        if plain:
            added = _triangle(tokens, query.dtype, query.device) if tokens > 1 else None
        else:
            added = None if whole is None else whole[:, :, at : at + tokens, first - base : end - base]
        many = max(1, _SCORES // (rows * tokens * (end - first)))
        groups = []
        for head in range(0, heads, many):
            group = slice(head, head + many)
            groups.append(
                attend_to_pieces(
                    query[group, :, at : at + tokens].flatten(1, 2),
                    [tuple(plane[group].narrow(1, first - base, end - first) for plane in planes)],
                    rows,
                    how,
                    mask=added[group] if added is not None and added.shape[0] > 1 else added,
                    sinks=None if sinks is None else sinks[group],
                )
            )
        output = groups[0] if len(groups) == 1 else torch.cat(groups)
        outputs.append(output.view(heads, rows, tokens, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


@functools.lru_cache(maxsize=256)
def _triangle(tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What hides from each of the last tokens those after it, ``[1, 1, tokens, tokens]``."""
    with torch.inference_mode(False):
        return torch.full((1, 1, tokens, tokens), float("-inf"), dtype=dtype, device=device).triu(1)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _scores(query: torch.Tensor, piece: Planes, scale: float) -> torch.Tensor:
    """``[key heads, rows, tokens of the piece]``"""
    keys = piece[0].to(query.dtype)
    # The product is scaled before it is rounded. What it would be added to is not looked at.
    scores = torch.baddbmm(
        _nothing(query.dtype, query.device), query, keys.transpose(1, 2), beta=0, alpha=scale
    )
    return scores if len(piece) == 2 else scores.mul_(piece[2].unsqueeze(1))


def _weighted(weights: torch.Tensor, piece: Planes) -> torch.Tensor:
    scaled = weights if len(piece) == 2 else (weights * piece[3].unsqueeze(1)).to(weights.dtype)
    return torch.bmm(scaled, piece[1].to(weights.dtype))
