"""Choosing tokens from logits that are none, and from what processors leave of them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList

from swarmcore.client.generation.sampling import TokenChooser, choose_tokens
from swarmcore.errors import InputError, RemoteFaultError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0])


def chooser(*processors: object, greedy: bool = True) -> TokenChooser:
    return TokenChooser([1, 2], LogitsProcessorList(processors), greedy=greedy, seed=None if greedy else 5)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("damage", [(math.nan, 0), (math.nan, 3)])
def test_logits_that_are_no_numbers_choose_no_token(greedy: bool, damage: tuple[float, int]) -> None:
    damaged = LOGITS.clone()
    damaged[damage[1]] = damage[0]
    with pytest.raises(RemoteFaultError, match="no numbers"):
        choose_tokens(torch.stack([LOGITS, damaged]), [chooser(greedy=greedy), chooser(greedy=greedy)])


@pytest.mark.parametrize("greedy", [True, False])
def test_processors_that_leave_no_token(greedy: bool) -> None:
    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf)

    with pytest.raises(InputError, match="left no token"):
        chooser(forbid, greedy=greedy).choose(LOGITS.clone())


@pytest.mark.parametrize("greedy", [True, False])
def test_processors_that_force_a_token(greedy: bool) -> None:
    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 2] = math.inf
        return scores

    assert chooser(force, greedy=greedy).choose(LOGITS.clone()) == 2


def test_rows_are_chosen_for_each_by_itself() -> None:
    def forbid_last(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, ids[0, -1:], -math.inf)

    rows = torch.stack([LOGITS, LOGITS, LOGITS])
    one, other = chooser(forbid_last), chooser(forbid_last)
    other.append(1)
    assert choose_tokens(rows, [chooser(), one, other]) == [1, 1, 3]


def test_the_likeliest_of_equals_is_the_first() -> None:
    tied = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert (
        choose_tokens(tied, [chooser()]) == [1] == choose_tokens(tied, [chooser(lambda ids, scores: scores)])
    )
