"""Faster processors do what those of transformers do, on scores of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarmcore.client.generation import logits_processors
from swarmcore.client.generation.logits_processors import faster
from swarmcore.client.generation.sampling import Sampler

VOCABULARY = 5000
IDS = torch.tensor([[1, 2, 3]])


def scores(kind: str) -> torch.Tensor:
    made = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    if kind == "peaked":
        return 4 * made
    if kind == "tied":  # as logits in bfloat16 are
        return (3 * made).round(decimals=0)
    if kind == "equal":
        return torch.zeros_like(made)
    if kind == "short":
        return made[:, :5]
    return made


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "equal", "short"])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("top_k", [0, 1, 50])
def test_the_nucleus_is_that_of_transformers(kind: str, top_p: float, top_k: int) -> None:
    before = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else [])]
    theirs = LogitsProcessorList([*before, TopPLogitsWarper(top_p)])
    given = scores(kind)
    assert torch.equal(faster(theirs)(IDS, given.clone()), theirs(IDS, given.clone()))


@pytest.mark.parametrize("top_k", [0, 50])
def test_of_equals_others_may_be_kept_where_nobody_compares(top_k: int) -> None:
    theirs = LogitsProcessorList([*([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(0.6)])
    given = scores("tied")
    made, expected = faster(theirs, exact=False)(IDS, given.clone()), theirs(IDS, given.clone())
    assert torch.equal(made.sort().values, expected.sort().values)


def test_most_of_the_time_not_all_tokens_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, **how: sizes.append(x.shape[-1]) or sort(x, **how))
    for processors in ([TopPLogitsWarper(0.9)], [TopKLogitsWarper(50), TopPLogitsWarper(0.9)]):
        faster(processors)(IDS, scores("peaked"))
    assert max(sizes) <= logits_processors.CANDIDATES


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_no_number_stays_none(odd: float) -> None:
    given = scores("peaked")
    given[0, 7] = odd
    made = faster([TopPLogitsWarper(0.9)])(IDS, given.clone())
    assert torch.equal(made.isnan(), TopPLogitsWarper(0.9)(IDS, given.clone()).isnan())


@pytest.mark.parametrize("ends", [[7], [7, 9, VOCABULARY + 3]])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_end_is_forbidden_for_as_long(ends: list[int], length: int) -> None:
    for theirs in (
        MinLengthLogitsProcessor(length, ends),
        MinNewTokensLengthLogitsProcessor(2, length - 2, ends),
    ):
        made = faster([theirs])(IDS, scores("flat"))
        assert torch.equal(made, theirs(IDS, scores("flat")))


def test_a_class_that_is_built_on_one_of_theirs_stays_itself() -> None:
    class Own(TopPLogitsWarper):
        pass

    class Other(LogitsProcessor):
        pass

    own = [Own(0.5), Other()]
    assert list(faster(own)) == own


def test_draws_without_a_seed_are_by_probability() -> None:
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log()
    sampler = Sampler([1], LogitsProcessorList(), greedy=False)
    sampler._generator.manual_seed(1)
    drawn = torch.tensor([sampler.sample(logits.clone()) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)
    assert shares[2] == 0
