"""Byte ranges and the sparse file that keeps them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.checkpoint.download import SparseFile, difference, length, pieces, union

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, end in ranges for byte in range(start, end)}


@given(RANGES)
def test_union_keeps_the_bytes_and_leaves_gaps_between_ranges(ranges: list[tuple[int, int]]) -> None:
    found = union(ranges)
    assert members(found) == members(ranges)
    assert all(before[1] < after[0] for before, after in pairwise(found))
    assert length(found) == len(members(ranges))


@given(RANGES, RANGES)
def test_difference_is_that_of_sets(wanted: list[tuple[int, int]], have: list[tuple[int, int]]) -> None:
    assert members(difference(wanted, have)) == members(wanted) - members(have)


@given(RANGES, st.integers(1, 10))
def test_pieces_are_small_and_lose_nothing(ranges: list[tuple[int, int]], most: int) -> None:
    found = list(pieces(union(ranges), most))
    assert members(found) == members(ranges)
    assert all(end - start <= most for start, end in found)


def test_union_closes_small_gaps() -> None:
    assert union([(0, 10), (14, 20), (40, 50)], gap=4) == [(0, 20), (40, 50)]


def test_a_sparse_file_has_what_was_logged(tmp_path: Path) -> None:
    file = SparseFile(tmp_path / "weights", 1000)
    assert file.have() == []
    with file.write() as writer:
        writer.put(500, b"b" * 100)
        writer.log(500, 600)
        writer.put(100, b"a" * 50)
        assert file.have() == [(500, 600)]
        writer.log(100, 150)
    assert file.have() == [(100, 150), (500, 600)]
    assert file.missing([(120, 520)]) == [(150, 500)]
    assert file.read(100, 150) == b"a" * 50


@pytest.mark.parametrize("torn", ["\n0 90", "\n0 900 .\n", "\nx y .\n", "\n-5 90 .\n", "\n0 90 . .\n"])
def test_a_line_that_a_crash_tore_counts_for_nothing(tmp_path: Path, torn: str) -> None:
    file = SparseFile(tmp_path / "weights", 1000)
    with file.write() as writer:
        writer.put(0, b"a" * 100)
        writer.log(10, 20)
    with (tmp_path / "weights.ranges").open("a") as log:
        log.write(torn)
    with file.write() as writer:
        writer.log(30, 40)
    assert file.have() == [(10, 20), (30, 40)]


def test_a_sparse_file_that_was_cut_off_has_nothing_beyond(tmp_path: Path) -> None:
    file = SparseFile(tmp_path / "weights", 1000)
    with file.write() as writer:
        writer.put(0, b"a" * 1000)
        writer.log(0, 100)
        writer.log(200, 300)
    with (tmp_path / "weights").open("r+b") as data:
        data.truncate(250)
    assert file.have() == [(0, 100)]
