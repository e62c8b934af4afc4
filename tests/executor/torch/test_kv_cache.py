from __future__ import annotations

import torch

from swarmcore.executor.torch.kv_cache import PAGE, CacheLayout, LayerShape, SequenceCache

SHAPES = (LayerShape(2, 4, 6), LayerShape(1, 4, 4), LayerShape(2, 4, 6))
LAYOUT = CacheLayout(SHAPES, torch.float32, torch.device("cpu"))


def fill(cache: SequenceCache, start: int, end: int, value: float) -> None:
    cache.prepare(start, end)
    keys, values = cache.views(start, end)
    for layer, (key, val) in enumerate(zip(keys, values, strict=True)):
        key.fill_(value + layer)
        val.fill_(-value - layer)


def only(tensor: torch.Tensor) -> float:
    """The one value that all elements have."""
    [value] = set(tensor.flatten().tolist())
    return float(value)


def test_layers_of_different_shape() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 3, 10.0)
    keys, values = cache.views(0, 3)
    assert [key.shape for key in keys] == [(1, 2, 3, 4), (1, 1, 3, 4), (1, 2, 3, 4)]
    assert [value.shape for value in values] == [(1, 2, 3, 6), (1, 1, 3, 4), (1, 2, 3, 6)]
    assert [only(key) for key in keys] == [10.0, 11.0, 12.0]


def test_grows_in_pages_and_keeps_what_it_holds() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, PAGE, 1.0)
    assert cache.capacity == PAGE
    fill(cache, PAGE, PAGE + 1, 2.0)
    assert cache.capacity == 2 * PAGE and cache.length == PAGE + 1
    assert only(cache.views(0, PAGE)[0][0]) == 1.0
    assert only(cache.views(PAGE, PAGE + 1)[0][0]) == 2.0


def test_reservation_is_taken_at_the_next_step() -> None:
    cache = SequenceCache(LAYOUT)
    cache.reserved = 3 * PAGE
    assert cache.capacity == 0
    cache.prepare(0, 1)
    assert cache.capacity == 3 * PAGE


def test_rollback_overwrites_in_place() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 10, 1.0)
    fill(cache, 4, 6, 2.0)
    assert cache.length == 6
    keys, _ = cache.views(0, 6)
    assert keys[0][0, 0, :, 0].tolist() == [1, 1, 1, 1, 2, 2]


def test_trim_gives_back_pages() -> None:
    cache = SequenceCache(LAYOUT)
    cache.reserved = 4 * PAGE
    fill(cache, 0, 5, 1.0)
    cache.reserved = PAGE
    cache.trim()
    assert cache.capacity == PAGE and cache.length == 5
    assert only(cache.views(0, 5)[0][2]) == 3.0
    cache.reserved = 0
    cache.trim()
    assert cache.capacity == 0 and cache.length == 0


def test_layout_counts_bytes() -> None:
    assert LAYOUT.bytes_per_token == (2 * 10 + 8 + 2 * 10) * 4
    assert LAYOUT.part(1, 2).bytes_per_token == 8 * 4


def test_a_copy_is_its_own_and_holds_no_more_than_it_has_room_for() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, PAGE + 5, 10.0)
    same, shorter = cache.copy(3 * PAGE), cache.copy(PAGE)
    assert (same.length, same.capacity) == (PAGE + 5, 3 * PAGE)
    assert (shorter.length, shorter.capacity) == (PAGE, PAGE)
    fill(cache, 0, PAGE, 50.0)
    for copied in (same, shorter):
        keys, values = copied.views(0, copied.length)
        assert [only(key) for key in keys] == [10.0, 11.0, 12.0]
        assert [only(value) for value in values] == [-10.0, -11.0, -12.0]


def test_a_cache_by_name_is_laid_out_as_announced() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 5, 10.0)
    parts = cache.tensors(1, 4)
    assert {name: tuple(part.shape) for name, part in parts.items()} == cache.shapes(3)
    assert cache.shapes(3) == {
        "keys.0": (2, 2, 3, 4),
        "values.0": (2, 2, 3, 6),
        "keys.1": (1, 1, 3, 4),
        "values.1": (1, 1, 3, 4),
    }
    assert [only(part) for part in parts["keys.0"]] == [10.0, 12.0]
