"""Heads: the same logits and losses as Transformers' classes have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from swarmcore.errors import AdapterError, InvalidBatchError, UnsupportedModelError
from swarmcore.training import SequenceClassificationHead, TokenClassificationHead

PAD = 0


def batch(*, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 120, (3, 6), generator=torch.Generator().manual_seed(1))
    for row, padding in enumerate((0, 2, 5)):
        ids[row, slice(0, padding) if left else slice(6 - padding, 6)] = PAD
    return ids, (ids != PAD).long()


def plain(kind: Any, family: str, labels: int) -> Any:
    config = tiny_config(family)
    config.num_labels, config.pad_token_id = labels, PAD
    return kind.from_config(config).eval()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (torch.tensor([2, 0, 1]), 3),
        (torch.tensor([0.5, -1.0, 2.0]), 1),
        (torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]]), 3),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_classes_of_sequences(family: str, labels: torch.Tensor, count: int, left: bool) -> None:
    model = plain(AutoModelForSequenceClassification, family, count)
    ids, mask = batch(left=left)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    head = SequenceClassificationHead.for_model(model.config, count)
    head.linear.load_state_dict(model.score.state_dict())
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = head(hidden, mask)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(head.loss(logits, labels), expected.loss)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_classes_of_tokens(family: str) -> None:
    model = plain(AutoModelForTokenClassification, family, 3)
    ids, mask = batch()
    labels = torch.where(mask == 1, ids % 3, -100)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    head = TokenClassificationHead.for_model(model.config, 3)
    head.linear.load_state_dict(getattr(model, head.name).state_dict())
    logits = head(model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(head.loss(logits, labels), expected.loss)


def test_a_new_head_is_drawn_as_transformers_does() -> None:
    head = TokenClassificationHead.for_model(tiny_config("llama"), 40, seed=1)
    again = TokenClassificationHead.for_model(tiny_config("llama"), 40, seed=1)
    assert torch.equal(head.linear.weight, again.linear.weight)
    assert 0.018 < head.linear.weight.std().item() < 0.022
    assert not head.linear.bias.any()


def test_masks_and_labels_that_do_not_fit() -> None:
    head = SequenceClassificationHead(8, 3)
    hidden = torch.randn(2, 5, 8)
    with pytest.raises(InvalidBatchError, match=r"attention mask must be \[2, 5\]"):
        head(hidden, torch.ones(2, 4))
    with pytest.raises(InvalidBatchError, match="all padding"):
        head(hidden, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]))
    logits = head(hidden)
    with pytest.raises(InvalidBatchError, match=r"labels must be \[2\]"):
        head.loss(logits, torch.tensor([1, 2, 0]))
    with pytest.raises(InvalidBatchError, match="from 0 to 2"):
        head.loss(logits, torch.tensor([1, 3]))
    with pytest.raises(InvalidBatchError, match=r"labels must be \[2, 3\]"):
        head.loss(logits, torch.tensor([1.0, 2.0]))
    tokens = TokenClassificationHead(8, 3)
    with pytest.raises(InvalidBatchError, match=r"labels must be \[2, 5\]"):
        tokens.loss(tokens(hidden), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(AdapterError, match="1 label or more"):
        SequenceClassificationHead(8, 0)
    with pytest.raises(UnsupportedModelError, match="no TOKEN_CLS head for olmo2"):
        TokenClassificationHead.for_model(tiny_config("olmo2"), 2)
