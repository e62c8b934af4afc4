"""Choosing tokens from logits that are none, and from what processors leave of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from transformers import LogitsProcessorList

from swarmcore.client.generation.sampling import Choice, Sampler, choose
from swarmcore.errors import InputError, RemoteFaultError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0])


def sampler(*processors: object, greedy: bool = True) -> Sampler:
    return Sampler([1, 2], LogitsProcessorList(processors), greedy=greedy, seed=None if greedy else 5)


def sample(rows: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | Exception | None]:
    """One token by each row."""
    chosen = choose(rows, [Choice(sampler) for sampler in samplers])
    return [each.tokens[0] if each.tokens else each.error for each in chosen]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("damage", [(math.nan, 0), (math.nan, 3)])
def test_logits_that_are_no_numbers_choose_no_token(greedy: bool, damage: tuple[float, int]) -> None:
    damaged = LOGITS.clone()
    damaged[damage[1]] = damage[0]
    good, bad = sample(torch.stack([LOGITS, damaged]), [sampler(greedy=greedy), sampler(greedy=greedy)])
    assert good in range(4)
    assert isinstance(bad, RemoteFaultError)
    assert "no numbers" in str(bad)


@pytest.mark.parametrize("greedy", [True, False])
def test_processors_that_leave_no_token(greedy: bool) -> None:
    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf)

    with pytest.raises(InputError, match="left no token"):
        sampler(forbid, greedy=greedy).sample(LOGITS.clone())


@pytest.mark.parametrize("greedy", [True, False])
def test_processors_that_force_a_token(greedy: bool) -> None:
    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 2] = math.inf
        return scores

    assert sampler(force, greedy=greedy).sample(LOGITS.clone()) == 2


def test_rows_are_chosen_for_each_by_itself() -> None:
    def forbid_last(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, ids[0, -1:], -math.inf)

    rows = torch.stack([LOGITS, LOGITS, LOGITS])
    one, other = sampler(forbid_last), sampler(forbid_last)
    other.append(1)
    assert sample(rows, [sampler(), one, other]) == [1, 1, 3]


def test_what_a_processor_raises_is_of_its_row_alone() -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    first, second, third = sample(torch.stack([LOGITS] * 3), [sampler(), sampler(fail), sampler()])
    assert (first, third) == (1, 1)
    assert isinstance(second, ZeroDivisionError)


def test_bfloat16_rows_give_what_their_float32_copies_give() -> None:
    rows = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    double = [lambda ids, scores: 2 * scores]
    assert sample(rows, [sampler() for _ in rows]) == rows.float().argmax(-1).tolist()
    mixed = [sampler(), sampler(*double), sampler(greedy=False), sampler(*double, greedy=False)] * 2
    copies = [sampler(), sampler(*double), sampler(greedy=False), sampler(*double, greedy=False)] * 2
    expected = [copy.sample(row.float()) for copy, row in zip(copies, rows, strict=False)]
    assert sample(rows, mixed[:6]) == expected


def test_the_likeliest_of_equals_is_the_first() -> None:
    tied = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert sample(tied, [sampler()]) == [1] == sample(tied, [sampler(lambda ids, scores: scores)])


def verified(
    rows: torch.Tensor, drafted: Sequence[int], *processors: object, **settings: object
) -> list[int]:
    chosen = choose(rows.clone(), [Choice(sampler(*processors), drafted, **settings)])
    assert chosen[0].error is None
    return chosen[0].tokens


def test_drafts_are_right_as_far_as_they_are_what_is_chosen() -> None:
    rows = torch.eye(4)[[2, 0, 3, 1]]
    assert verified(rows[:1], []) == [2]
    assert verified(rows, [2, 0, 3]) == [2, 0, 3, 1]
    assert verified(rows, [2, 1, 3]) == [2, 0]
    assert verified(rows, [1, 0, 3]) == [2]
    assert verified(rows, [2, 0, 1]) == [2, 0, 3]


def test_nothing_is_chosen_after_the_end_of_a_text() -> None:
    assert verified(torch.eye(4)[[2, 0, 3, 1]], [2, 0, 3], ends={0}) == [2, 0]


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("drafts", ["right", "wrong", "half"])
def test_verified_tokens_are_those_that_are_chosen_one_by_one(processed: bool, drafts: str) -> None:
    """Whatever is drafted, with as many random numbers and calls of processors."""
    calls: list[list[int]] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids[0].tolist())
        return scores - (ids[0].bincount(minlength=50)[None] > 1) * 2.0

    processors = [note] if processed else []
    rows = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    plain, expected = sampler(*processors, greedy=False), list[int]()
    for row in rows:
        expected.append(plain.sample(row.clone()))
        plain.append(expected[-1])
    expected_calls, calls = list(calls), []
    tokens, drafted, taken = list[int](), sampler(*processors, greedy=False), 0
    while len(tokens) < 40:
        right = expected[taken : taken + 4][: 39 - taken]
        draft = {
            "right": right,
            "wrong": [(token + 1) % 50 for token in right],
            "half": [token if place % 3 else (token + 1) % 50 for place, token in enumerate(right, taken)],
        }[drafts]
        (chosen,) = choose(rows[taken : taken + len(draft) + 1].clone(), [Choice(drafted, draft)])
        tokens += chosen.tokens
        taken = len(tokens)
    assert tokens == expected
    assert calls == expected_calls


def test_what_a_processor_raises_comes_after_what_was_chosen_before_it() -> None:
    def fail_third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 4:
            raise ZeroDivisionError
        return scores

    rows = torch.eye(4)[[2, 0, 3, 1]]
    chosen, other = choose(
        torch.cat([rows, rows]), [Choice(sampler(fail_third), [2, 0, 3]), Choice(sampler(), [2, 0, 3])]
    )
    assert chosen.tokens == [2, 0]
    assert isinstance(chosen.error, ZeroDivisionError)
    assert other.tokens == [2, 0, 3, 1]
