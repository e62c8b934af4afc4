"""Attention over caches in one piece and in several, by fused kernel and by products, against plain sums."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from swarmcore.executor.torch import attention_products, cache_pages
from swarmcore.executor.torch.batch import Attention
from swarmcore.executor.torch.cache_pages import PAGE, CacheLayout, LayerShape
from swarmcore.executor.torch.families.alibi import AlibiBias
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.ragged_batch import RaggedBatch

KEY_HEADS, ROWS, SIZE, VALUE_SIZE = 2, 3, 8, 6
HEADS = KEY_HEADS * ROWS
LENGTHS = (3 * PAGE + 9, PAGE + 1, 5)
TOLERANCES = {(torch.float32, False): 1e-5, (torch.bfloat16, False): 0.02, (torch.float32, True): 0.02}

WAYS = {
    "full": Attention(SIZE**-0.5),
    "window": Attention(SIZE**-0.5, window=PAGE + 5),
    "narrow window": Attention(SIZE**-0.5, window=3),
    "chunks": Attention(SIZE**-0.5, chunk=PAGE + 3),
    "soft cap": Attention(SIZE**-0.5, softcap=1.5),
    "sinks": Attention(SIZE**-0.5, window=PAGE + 5, sinks=torch.linspace(-1, 2, HEADS)),
    "bias": Attention(
        SIZE**-0.5,
        bias=AlibiBias(lambda count: torch.linspace(0.01, 0.1, HEADS)[:, None] * torch.arange(count)),
    ),
}


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, how: Attention
) -> torch.Tensor:
    """``[1, tokens, heads, size]`` of ``[1, heads, tokens, size]``, in float32 and over all positions."""
    length = keys.shape[2]
    keys, values = (each[0].float().repeat_interleave(ROWS, 0) for each in (keys, values))
    scores = query[0].float() @ keys.transpose(1, 2) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if how.bias is not None:
        scores = scores + how.bias.keys(length)[0]
    for token in range(query.shape[2]):
        position = start + token
        scores[:, token, : how.first_key(position)] = -math.inf
        scores[:, token, position + 1 :] = -math.inf
    if how.sinks is not None:
        scores = torch.cat((scores, how.sinks.view(-1, 1, 1).expand(-1, query.shape[2], 1)), -1)
    return (torch.softmax(scores, -1)[..., :length] @ values).transpose(0, 1).unsqueeze(0)


class Sequences:
    """Caches, and all that was put into them."""

    def __init__(self, dtype: torch.dtype, quantised: bool) -> None:
        self.dtype = dtype
        layers = (LayerShape(KEY_HEADS, SIZE, VALUE_SIZE),) * 2
        self.layout = CacheLayout(layers, dtype, torch.device("cpu"), quantised)
        self.generator = torch.Generator().manual_seed(3)
        self.caches = [SequenceCache(self.layout) for _ in LENGTHS]
        self.kept = [
            (self.random(KEY_HEADS, 0, SIZE), self.random(KEY_HEADS, 0, VALUE_SIZE)) for _ in LENGTHS
        ]

    def random(self, heads: int, tokens: int, size: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, size, generator=self.generator).to(self.dtype)

    def attend(self, how: Attention, counts: tuple[int, ...], back: int = 0) -> float:
        """Some new tokens for each sequence, after a rollback by ``back``; return the largest error."""
        starts = [max(0, keys.shape[2] - back) for keys, _ in self.kept]
        batch = RaggedBatch(list(zip(self.caches, starts, counts, strict=True)), torch.device("cpu"))
        tokens = sum(counts)
        query = self.random(HEADS, tokens, SIZE)
        new = self.random(KEY_HEADS, tokens, SIZE), self.random(KEY_HEADS, tokens, VALUE_SIZE)
        outputs = [batch.attend(layer, query, *new, how) for layer in (0, 1)]
        worst, at = 0.0, 0
        for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
            rows = slice(at, at + count)
            self.kept[number] = (
                torch.cat((self.kept[number][0][:, :, :start], new[0][:, :, rows]), 2),
                torch.cat((self.kept[number][1][:, :, :start], new[1][:, :, rows]), 2),
            )
            right = expected(query[:, :, rows], *self.kept[number], start, how)
            for output in outputs:
                worst = max(worst, (output[:, rows].float() - right).abs().max().item())
            at += count
        return worst


@pytest.mark.parametrize("dtype, quantised", TOLERANCES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("products", [False, True])
@torch.inference_mode()
def test_attention_is_what_it_is_by_hand(
    way: str, dtype: torch.dtype, quantised: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = WAYS[way]
    if products:
        for name in ("_WORTHWHILE", "_WORTHWHILE_ALONE"):
            monkeypatch.setattr(attention_products, name, 0)
        monkeypatch.setattr(attention_products, "BLOCK", 16)
        monkeypatch.setattr(cache_pages, "EXTENT", 2 * PAGE)
    sequences = Sequences(dtype, quantised)
    error = partial(sequences.attend, how)
    tolerance = TOLERANCES[dtype, quantised]
    for counts, back in ((LENGTHS, 0), ((1, 1, 1), 0), ((7, 1, 3), 2), ((1, 1, 1), 70), ((30, 2, 1), 1)):
        assert error(counts, back) < tolerance
    # And on pages that they have in common with others, which go on as well.
    others = [cache.fork(10 * PAGE) for cache in sequences.caches]
    for cache in others:
        cache.prepare(max(0, cache.length - 3), cache.length)
        for slots in cache.slots(max(0, cache.length - 3), cache.length):
            for plane in (plane for layer in slots for plane in layer):
                plane.fill_(100)
    assert error((1, 1, 1)) < tolerance
    assert error((2, 1, 1), 1) < tolerance


@torch.inference_mode()
def test_what_is_not_finite_stays_with_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "_WORTHWHILE", 0)
    sequences = Sequences(torch.bfloat16, False)
    sequences.attend(WAYS["full"], LENGTHS)
    cache, length = sequences.caches[0], LENGTHS[0]
    batch = RaggedBatch([(cache, length, 1), (cache, length + 1, 1)], torch.device("cpu"))
    query, keys, values = (
        sequences.random(*shape) for shape in ((HEADS, 2, 8), (KEY_HEADS, 2, 8), (KEY_HEADS, 2, 6))
    )
    values[:, :, 1] = math.nan
    output = batch.attend(0, query, keys, values, WAYS["full"])
    assert output[:, 0].isfinite().all() and output[:, 1].isnan().all()
    cache.wipe(length + 1, length + 2)
    batch = RaggedBatch([(cache, length, 1)], torch.device("cpu"))
    assert batch.attend(0, query[:, :, :1], keys[:, :, :1], values[:, :, :1], WAYS["full"]).isfinite().all()


@pytest.mark.parametrize("far", [3e38, -3e38])
@torch.inference_mode()
def test_keys_that_are_not_seen_do_not_matter(far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "_WORTHWHILE", 0)
    sequences = Sequences(torch.bfloat16, False)
    sequences.attend(WAYS["full"], LENGTHS)
    for cache in sequences.caches:
        for plane in cache.runs[0].extent.stores[0]:
            plane[..., cache.length :, :] = far
    assert sequences.attend(WAYS["full"], (1, 1, 1)) < TOLERANCES[torch.bfloat16, False]
