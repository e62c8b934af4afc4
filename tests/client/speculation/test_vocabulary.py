"""Tokens of one model as tokens of another: the same, or of the same text."""

from __future__ import annotations

import random

import pytest
from byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from swarmcore.client.speculation.vocabulary import SameTokens, Vocabulary, vocabulary_of
from swarmcore.errors import UnsupportedModelError

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. Größe and 世界 are words. " * 8
)


def trained_tokenizer(text: str = TEXT, *, lower: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges of a text."""
    backend = Tokenizer(models.BPE())
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def large() -> PreTrainedTokenizerFast:
    return trained_tokenizer()


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerFast:
    return trained_tokenizer("A dog is a fox that minds the quick words. " * 9)


def between(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary_of(ours, len(ours), theirs, len(theirs), "draft")


def test_equal_tokens_are_the_same_whatever_the_models_are_called(large: PreTrainedTokenizerFast) -> None:
    vocabulary = between(large, trained_tokenizer())
    assert isinstance(vocabulary, SameTokens)
    text = vocabulary.text()
    text.append([1, 2])
    assert text.draft_ids([3]) == ([1, 2, 3], 2)
    assert text.back([1, 2, 3, 4, 5], 2) == [4, 5]


def test_a_few_more_special_tokens_on_either_side_do_not_matter(large: PreTrainedTokenizerFast) -> None:
    more = trained_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<call>", "<answer>"]})
    drafting_for_more = between(more, large)
    assert isinstance(drafting_for_more, SameTokens) and drafting_for_more.usable == 310
    text = drafting_for_more.text()
    text.append([7, 311, 8])  # one that the draft model does not have
    assert text.draft_ids([310, 9]) == ([7, 8, 9], 2)
    assert between(large, more).usable == 310


def test_another_vocabulary_is_translated_through_text(
    large: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    for ours, theirs in ((large, other), (other, large)):
        vocabulary = between(ours, theirs)
        assert not vocabulary.exact
        text = vocabulary.text()
        begin = "The quick brown fox jumps"
        text.append(ours(begin)["input_ids"])
        ahead = " over the lazy"
        ids, certain = text.draft_ids(ours(ahead)["input_ids"])
        assert ids == theirs(begin + ahead)["input_ids"] and certain == 0
        drafted = theirs(" dog, and")["input_ids"]
        assert ours.decode(text.back([*ids, *drafted], len(drafted))) == " dog, and"


def test_what_is_drafted_is_cut_as_the_model_would_cut_it(
    large: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    text = between(large, other).text()
    cut = TEXT.index(" and")
    tokens = large(TEXT[:cut])["input_ids"]
    text.append(tokens)
    ids, _ = text.draft_ids([])
    drafted = other(TEXT[cut:90])["input_ids"]
    together = large(TEXT[:90])["input_ids"]
    assert together[: len(tokens)] == tokens
    assert text.back([*ids, *drafted], len(drafted)) == together[len(tokens) :]


def test_within_a_character_there_is_no_draft(large: PreTrainedTokenizerFast) -> None:
    text = between(byte_tokenizer(), large).text()
    half = byte_tokenizer()("ab é")["input_ids"][:-1]
    text.append(half)
    assert text.draft_ids([]) == ([], 0)
    ids, _ = text.draft_ids(byte_tokenizer()("é")["input_ids"][1:])
    assert ids == large("ab é")["input_ids"]


def test_a_long_text_is_translated_once(
    large: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    chance = random.Random(0)
    words = TEXT.split(" ")
    text = between(large, other).text()
    whole: list[int] = []
    settled = 0
    for _ in range(60):
        tokens = large(" " + " ".join(chance.choices(words, k=20)))["input_ids"]
        text.append(tokens)
        whole += tokens
        ids, certain = text.draft_ids([])
        assert ids == other(large.decode(whole))["input_ids"]
        assert settled <= certain <= len(ids)
        settled = certain
    assert len(ids) - settled < 1024 < settled


def test_a_tokenizer_that_changes_texts_is_refused_by_name(large: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedModelError, match='the draft model draft makes "the quick'):
        between(large, trained_tokenizer(lower=True))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer of the model makes"):
        between(trained_tokenizer(lower=True), large)
