from __future__ import annotations

import pytest
import torch

from swarmcore.executor.torch.cache_pages import EXTENT, PAGE, CacheLayout, LayerShape, PagePool
from swarmcore.executor.torch.kv_cache import SequenceCache

SHAPES = (LayerShape(2, 4, 6), LayerShape(1, 4, 4), LayerShape(2, 4, 6))
LAYOUT = CacheLayout(SHAPES, torch.float32, torch.device("cpu"))


def fill(cache: SequenceCache, start: int, end: int, value: float) -> None:
    cache.prepare(start, end)
    for run in cache.slots(start, end):
        for layer, (keys, values) in enumerate(run):
            keys.fill_(value + layer)
            values.fill_(-value - layer)


def read(cache: SequenceCache, start: int = 0, end: int | None = None) -> list[float]:
    """The value of each token, which is the same all over the layers."""
    parts = cache.tensors(start, cache.length if end is None else end)
    both = torch.cat(parts["keys.0"], 2), torch.cat(parts["values.0"], 2)
    tokens = both[0][0, 0, :, 0]
    for keys, values in zip(*both, strict=True):
        assert torch.equal(keys, (tokens + keys[0, 0, 0] - tokens[0])[None, :, None].expand_as(keys))
        assert torch.equal(values, -keys[:, :, :1].expand_as(values))
    return [float(token) for token in tokens]


def pages(pool: PagePool) -> float:
    return pool.nbytes / (PAGE * LAYOUT.bytes_per_token)


def test_layers_of_different_shape() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 3, 10.0)
    [run] = cache.slots(0, 3)
    assert [keys.shape for keys, _ in run] == [(1, 2, 3, 4), (1, 1, 3, 4), (1, 2, 3, 4)]
    assert [values.shape for _, values in run] == [(1, 2, 3, 6), (1, 1, 3, 4), (1, 2, 3, 6)]
    assert [set(keys.flatten().tolist()) for keys, _ in run] == [{10.0}, {11.0}, {12.0}]


def test_grows_in_pages_and_keeps_what_it_holds() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, PAGE, 1.0)
    assert cache.capacity == PAGE
    fill(cache, PAGE, PAGE + 1, 2.0)
    assert cache.capacity == 2 * PAGE and cache.length == PAGE + 1
    assert read(cache) == [1.0] * PAGE + [2.0]


def test_full_extents_are_not_copied_as_it_grows() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, EXTENT, 1.0)
    [full] = cache.runs
    memory = full.extent.stores[0][0].data_ptr()
    fill(cache, EXTENT, EXTENT + PAGE + 1, 2.0)
    assert cache.runs[0] is full and full.extent.stores[0][0].data_ptr() == memory
    assert [run.extent.capacity for run in cache.runs] == [EXTENT, 2 * PAGE]
    assert read(cache) == [1.0] * EXTENT + [2.0] * (PAGE + 1)
    fill(cache, EXTENT - 2, EXTENT + 3, 3.0)
    assert read(cache, EXTENT - 3) == [1.0] + [3.0] * 5


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
    assert read(cache) == [1, 1, 1, 1, 2, 2]


def test_trim_gives_back_pages() -> None:
    pool = PagePool()
    cache = SequenceCache(LAYOUT, pool)
    cache.reserved = 4 * PAGE
    fill(cache, 0, 5, 1.0)
    assert pages(pool) == 4
    cache.reserved = PAGE
    cache.trim()
    assert (cache.capacity, cache.length, pages(pool)) == (PAGE, 5, 1)
    assert read(cache) == [1.0] * 5
    cache.reserved = 0
    cache.trim()
    assert (cache.capacity, cache.length, pages(pool)) == (0, 0, 0)


def test_layout_counts_bytes() -> None:
    assert LAYOUT.bytes_per_token == (2 * 10 + 8 + 2 * 10) * 4
    assert LAYOUT.part(1, 2).bytes_per_token == 8 * 4
    quantised = CacheLayout(SHAPES, torch.float32, torch.device("cpu"), quantised=True)
    assert quantised.bytes_per_token == (2 * 10 + 8 + 2 * 10) + 2 * 4 * (2 + 1 + 2)


def test_a_fork_shares_whole_pages_and_holds_no_more_than_it_has_room_for() -> None:
    pool = PagePool()
    cache = SequenceCache(LAYOUT, pool)
    fill(cache, 0, 2 * PAGE + 5, 10.0)
    same, shorter = cache.fork(3 * PAGE), cache.fork(PAGE)
    assert (same.length, shorter.length) == (2 * PAGE + 5, PAGE)
    assert pages(pool) == 3
    fill(cache, 0, PAGE, 50.0)
    for fork in (same, shorter):
        assert read(fork) == [10.0] * fork.length
    assert read(cache) == [50.0] * PAGE


@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("start", [0, 3, PAGE, PAGE + 3, 2 * PAGE + 5])
def test_only_the_page_that_is_written_is_copied(writer: int, start: int) -> None:
    pool = PagePool()
    cache = SequenceCache(LAYOUT, pool)
    fill(cache, 0, 2 * PAGE + 5, 1.0)
    both = cache, cache.fork(3 * PAGE)
    both[1].reserved = 0
    fill(both[writer], start, start + 2, 2.0)
    assert pages(pool) == 4  # one more than before
    assert read(both[writer]) == [1.0] * start + [2.0] * 2
    assert read(both[1 - writer]) == [1.0] * (2 * PAGE + 5)
    fill(both[1 - writer], start, start + 2, 3.0)
    assert read(both[writer]) == [1.0] * start + [2.0] * 2
    assert read(both[1 - writer]) == [1.0] * start + [3.0] * 2
    for each in both:
        each.release()
    assert pages(pool) == 0


def test_what_nobody_else_reads_any_more_is_put_together_as_it_grows() -> None:
    pool = PagePool()
    cache = SequenceCache(LAYOUT, pool)
    fill(cache, 0, 3 * PAGE, 1.0)
    fork = cache.fork(2 * PAGE, PAGE + 1)
    fill(fork, PAGE + 1, PAGE + 3, 2.0)
    assert len(fork.runs) == 2 and pages(pool) == 4
    assert cache.release()
    fill(fork, PAGE + 3, 2 * PAGE, 3.0)
    assert pages(pool) == 2  # the first extent is as long as what the fork has of it
    fill(fork, 2 * PAGE, 2 * PAGE + 1, 4.0)
    assert len(fork.runs) == 1 and pages(pool) == 3
    assert read(fork) == [1.0] * (PAGE + 1) + [2.0] * 2 + [3.0] * (PAGE - 3) + [4.0]


def test_a_cache_by_name_is_laid_out_as_announced() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 5, 10.0)
    parts = cache.tensors(1, 4)
    found = {name: (tuple(part.shape), part.dtype) for name, [part] in parts.items()}
    assert (
        found
        == cache.shapes(3)
        == {
            "keys.0": ((2, 2, 3, 4), torch.float32),
            "values.0": ((2, 2, 3, 6), torch.float32),
            "keys.1": ((1, 1, 3, 4), torch.float32),
            "values.1": ((1, 1, 3, 4), torch.float32),
        }
    )
    assert [set(part.flatten().tolist()) for part in parts["keys.0"][0]] == [{10.0}, {12.0}]


def test_memory_that_no_token_has_been_written_to_is_zero() -> None:
    cache = SequenceCache(LAYOUT)
    fill(cache, 0, 70, float("nan"))
    cache.wipe(0, 70)
    fill(cache, 0, 3, 1.0)
    cache.reserved = 10 * PAGE
    cache.prepare(3, 4)
    [run] = cache.runs
    for plane in run.extent.stores[0]:
        assert not plane[..., 3:, :].any()
