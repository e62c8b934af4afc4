"""What the layers see: read from the family's own masks, and refused where it is anything unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, save_random_model
from transformers import AttentionMaskInterface, AutoConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from swarmcore.checkpoint import open_checkpoint
from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.torch.attention import NAME, computing, probing_attention, ragged_attention
from swarmcore.executor.torch.batch import Attention, causal_mask
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.masks import FULL, Mask, OtherMask, describe_mask
from swarmcore.types import Span


def test_transformers_masks_are_described() -> None:
    assert describe_mask(causal_mask_function) == FULL
    assert describe_mask(sliding_window_causal_mask_function(4096), 4096) == Mask(window=4096)
    chunked = chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long))
    assert describe_mask(chunked, 8192) == Mask(chunk=8192)


@pytest.mark.parametrize(
    ("function", "size", "why"),
    [
        (bidirectional_mask_function, None, "tokens after them"),
        (sliding_window_bidirectional_mask_function(8), 8, "tokens after them"),
        (sliding_window_causal_mask_function(8), None, "neither causal"),
        (sliding_window_causal_mask_function(0), 0, "neither causal"),
        (sliding_window_causal_mask_function(8), 9, "neither causal"),
        (
            or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 4))),
            None,
            "more than the positions",
        ),
    ],
)
def test_other_masks_are_refused(function: Any, size: int | None, why: str) -> None:
    mask = describe_mask(function, size)
    assert isinstance(mask, OtherMask) and why in mask.why
    rows = torch.ones(1, 1, 1, 4)
    with pytest.raises(UnsupportedModelError, match=why):
        probing_attention(torch.nn.Module(), rows, rows, rows, mask)


@pytest.mark.parametrize("mask", [FULL, Mask(window=3), Mask(chunk=4)], ids=str)
def test_a_batch_sees_what_the_mask_says(mask: Mask) -> None:
    how = Attention(1.0, mask.window, mask.chunk)
    for start, end in [(0, 9), (2, 7), (5, 7), (8, 9), (3, 4)]:
        first = how.first_key(start)
        queries, keys = torch.arange(start, end)[:, None], torch.arange(end)[None, :]
        expected = mask.sees(queries, keys)
        assert not expected[:, :first].any()
        made = causal_mask(start, end, how, torch.device("cpu"), torch.float32)
        seen = torch.ones_like(expected[:, first:]) if made is None else made[0, 0] == 0
        assert torch.equal(seen, expected[:, first:])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "mask of their own"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"anything_new": 1}, "anything_new"),
        ({"dropout": 0.1}, "drops out"),
    ],
)
def test_whatever_would_change_the_result_is_an_error(given: dict[str, Any], named: str) -> None:
    rows = torch.ones(1, 2, 2, 4)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]

    class Batch:
        updates = None

        def attend(self, *arguments: Any) -> torch.Tensor:
            return rows

    with computing(Batch()), pytest.raises(UnsupportedModelError, match=named):
        ragged_attention(module, rows, rows, rows, **{"attention_mask": None, **given})


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("llama", {"is_causal": False}, "bidirectional"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 16}, "bidirectional"),
        ("doge", {}, "attention mask"),
    ],
)
def test_families_whose_masks_are_not_served(
    tmp_path: Path, family: str, settings: dict[str, Any], why: str
) -> None:
    save_random_model(AutoConfig.for_model(family, **{**SIZES, **settings}), tmp_path)
    with pytest.raises(UnsupportedModelError, match=why):
        TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(0, 2))


@pytest.mark.parametrize(
    "change",
    [lambda m: m + torch.ones(1), lambda m: torch.ones(1) + m, lambda m: m[:, 0], lambda m: m.to("cpu")],
)
def test_what_changes_a_mask_is_refused(change: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="change the attention mask"):
        change(FULL)


def test_no_masks_are_made_for_steps() -> None:
    assert NAME not in AttentionMaskInterface().valid_keys()
