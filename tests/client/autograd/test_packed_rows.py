"""Padded batches as rows without padding, and back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.client.autograd.packing import PackedRows
from swarmcore.errors import InputError


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(sign) for sign in row] for row in rows])


def test_without_padding_everything_is_a_token():
    rows = PackedRows((3, 4), None)
    assert rows.lengths == (4, 4, 4)
    values = torch.randn(3, 4, 2)
    parts = rows.pack(values, rows.groups(8))
    assert [part.shape for part in parts] == [(8, 2), (4, 2)]
    assert torch.equal(rows.unpack(parts, values), values)


def test_padding_at_either_end_does_not_travel_and_comes_back_as_zeros():
    mask = mask_of("0111", "1100", "0000", "0110")
    rows = PackedRows((4, 4), mask)
    assert rows.lengths == (3, 2, 2)
    values = torch.randn(4, 4, 2)
    parts = rows.pack(values, rows.groups(5))
    assert [part.shape for part in parts] == [(5, 2), (2, 2)]
    assert torch.equal(rows.unpack(parts, values), values * mask[..., None])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_groups_keep_the_order_and_the_bound(lengths: list[int], tokens: int):
    mask = torch.tensor([[int(i < length) for i in range(9)] for length in lengths])
    groups = PackedRows((len(lengths), 9), mask).groups(tokens)
    assert [length for group in groups for length in group] == lengths
    assert all(sum(group) <= tokens or len(group) == 1 for group in groups)
    # No two neighbours would have fitted into one.
    assert all(sum(a) + b[0] > tokens for a, b in pairwise(groups))


def test_what_is_packed_is_a_copy_in_the_dtype_of_the_values():
    values = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    rows = PackedRows((1, 2), None)
    (part,) = rows.pack(values, rows.groups(2))
    values.zero_()
    assert part.dtype == "bfloat16"
    assert rows.unpack([part], torch.empty(0)).tolist() == [[[1.0] * 3] * 2]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (mask_of("101", "111"), "holes"),
        (mask_of("1111", "1111"), "shape"),
        (mask_of("000", "000"), "no token"),
        (torch.ones(2, 1, 3, 3), "shape"),
    ],
)
def test_masks_that_do_not_work(mask: torch.Tensor, said: str):
    with pytest.raises(InputError, match=said):
        PackedRows((2, 3), mask)
