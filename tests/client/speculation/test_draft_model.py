"""A small model as drafter: what it proposes is what plain Transformers makes of the same text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from random_gguf import write_random_gguf
from transformers import AutoModelForCausalLM

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.draft_loading import load_draft
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.speculation.draft_model import DraftModel
from swarmcore.client.speculation.drafter import DraftRequest
from swarmcore.client.speculation.guarded import GuardedSource
from swarmcore.client.speculation.local_decoder import LocalDecoder
from swarmcore.prompts import load_tokenizer

VOCABULARY = 257


@pytest.fixture(scope="module")
def loaded(llama_folder: Path) -> Iterator[DraftModel]:
    checkpoint = open_checkpoint(str(llama_folder))
    parts = LocalParts.load(checkpoint, dtype="float32")
    model = load_draft(str(llama_folder), checkpoint, parts, byte_tokenizer(), dtype="float32")
    assert isinstance(model, DraftModel)
    yield model
    model.close()
    model.close()


@pytest.fixture
def source(loaded: DraftModel) -> DraftModel:
    """One that proposes as much as is asked for, however unlikely."""
    return DraftModel(loaded.decoder, loaded.vocabulary, stop_below=0.0)


@torch.inference_mode()
def greedy(plain: Any, text: list[int], k: int) -> tuple[list[int], list[float]]:
    tokens, probabilities = list(text), []
    for _ in range(k):
        likely = plain(torch.tensor([tokens])).logits[0, -1].softmax(-1)
        tokens.append(int(likely.argmax()))
        probabilities.append(float(likely.max()))
    return tokens[len(text) :], probabilities


def test_it_proposes_the_likeliest_tokens_and_says_how_likely_they_are(
    source: DraftModel, plain: Any
) -> None:
    drafter = source.drafter()
    text = list(b"Once upon a time")
    drafter.append(text[:10])
    drafter.append(text[10:])
    tokens, probabilities = greedy(plain, text, 6)
    assert drafter.propose([], 6) == tokens
    assert list(drafter.probabilities) == pytest.approx(probabilities, rel=1e-3)
    assert drafter.propose(list(b", there"), 4) == greedy(plain, [*text, *b", there"], 4)[0]
    drafter.close()
    drafter.close()


def test_it_goes_on_from_what_is_cached_whatever_was_accepted(source: DraftModel, plain: Any) -> None:
    chance = random.Random(0)
    drafters = [source.drafter() for _ in range(3)]
    texts = [[chance.randrange(256) for _ in range(length)] for length in (3, 90, 20)]
    for drafter, text in zip(drafters, texts, strict=True):
        drafter.append(text)
    for _ in range(6):
        aheads = [[chance.randrange(256) for _ in range(chance.randrange(3))] for _ in drafters]
        ks = [chance.randrange(1, 5) for _ in drafters]
        requests = [DraftRequest(*each) for each in zip(drafters, aheads, ks, strict=True)]
        proposals = source.propose(requests)
        for drafter, text, ahead, k, proposal in zip(drafters, texts, aheads, ks, proposals, strict=True):
            assert proposal == greedy(plain, [*text, *ahead], k)[0]
            new = [*ahead, *proposal][: chance.randrange(1, 6)] + [7] * chance.randrange(2)
            drafter.append(new)
            text.extend(new)
    for drafter in drafters:
        drafter.close()
    assert source.decoder.cached_tokens == 0


def test_only_what_is_new_is_computed(source: DraftModel) -> None:
    drafter = source.drafter()
    drafter.append(list(range(100)))  # taken in at once, while steps are under way
    before = source.decoder.computed
    tokens = drafter.propose([], 4)
    assert source.decoder.computed - before == 4  # the last token of the text, and three drafts
    drafter.append([*tokens[:2], 99])
    before = source.decoder.computed
    drafter.propose([], 1)
    assert source.decoder.computed - before == 1
    drafter.propose([], 1)
    assert source.decoder.computed - before == 2
    drafter.close()


def test_a_proposal_ends_where_it_becomes_unlikely(source: DraftModel, plain: Any) -> None:
    text = list(b"Once upon")
    tokens, probabilities = greedy(plain, text, 8)
    after_three = probabilities[0] * probabilities[1] * probabilities[2]
    for stop_below, count in ((after_three * 0.99, 4), (after_three * 1.01, 3), (1.0, 1)):
        drafter = DraftModel(source.decoder, source.vocabulary, stop_below=stop_below).drafter()
        drafter.append(text)
        assert drafter.propose([], 8) == tokens[:count]
        assert list(drafter.probabilities) == pytest.approx(probabilities[:count], rel=1e-3)
        drafter.close()


def test_a_proposal_that_nobody_waits_for_any_more_ends_early(source: DraftModel, plain: Any) -> None:
    drafters = [source.drafter() for _ in range(2)]
    for drafter in drafters:
        drafter.append([1, 2, 3])
    before, left = source.decoder.computed, iter([True, True, False])
    given_up = DraftRequest(drafters[0], [], 8, lambda: next(left))
    proposals = source.propose([given_up, DraftRequest(drafters[1], [], 4)])
    tokens, _ = greedy(plain, [1, 2, 3], 4)
    assert proposals == [tokens[:2], tokens]
    assert source.decoder.computed - before == 3 + 1 + 3 + 3
    for drafter in drafters:
        drafter.close()


def test_a_text_that_is_too_long_for_it_has_no_drafts(source: DraftModel) -> None:
    assert source.decoder.longest == 256
    drafter = source.drafter()
    drafter.append([1] * 250)
    assert len(drafter.propose([], 6)) == 6
    assert drafter.propose([], 7) == []
    drafter.append([1] * 300)
    assert drafter.propose([], 1) == []
    drafter.close()


def test_with_nothing_to_go_on_there_is_no_draft(source: DraftModel) -> None:
    assert source.drafter().propose([], 3) == []


def test_caches_are_bounded_and_the_text_of_longest_ago_is_taken_in_again(
    source: DraftModel, plain: Any
) -> None:
    decoder = source.decoder
    executor = decoder._executor
    small = LocalDecoder(decoder.parts, executor, cache_bytes=600 * executor.cache_bytes_per_token)
    drafters = [DraftModel(small, source.vocabulary, stop_below=0.0).drafter() for _ in range(4)]
    for number, drafter in enumerate(drafters):
        drafter.append([number + 1] * 20)
    for _ in range(2):
        for number, drafter in enumerate(drafters):
            assert drafter.propose([], 2) == greedy(plain, [number + 1] * 20, 2)[0]
            assert small.cached_tokens <= 600
    # More at a time than there is room for go in several passes.
    proposals = drafters[0].source.propose([DraftRequest(drafter, [], 1) for drafter in drafters])
    assert proposals == [greedy(plain, [number + 1] * 20, 1)[0] for number in range(4)]
    for drafter in drafters:
        drafter.close()
    assert small.cached_tokens == 0
    small._loop.close()  # the executor is that of the others


def test_after_an_error_of_the_executor_it_begins_anew(
    source: DraftModel, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = source.drafter()
    drafter.append([1, 2, 3])
    drafter.propose([], 2)

    async def fails(batch: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(source.decoder._executor, "step", fails)
        with pytest.raises(MemoryError):
            drafter.propose([4], 2)
    assert source.decoder.cached_tokens == 0
    assert drafter.propose([4], 2) == greedy(plain, [1, 2, 3, 4], 2)[0]
    drafter.close()


def test_a_gguf_is_run_by_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    file = write_random_gguf(tmp_path / "draft.gguf", vocabulary=300)
    checkpoint = open_checkpoint(str(file), cache_dir=tmp_path / "cache")
    tokenizer = load_tokenizer(checkpoint.folder, "draft")
    parts = LocalParts.load(checkpoint, dtype="float32")
    model = load_draft(str(file), checkpoint, parts, tokenizer, dtype="float32", threads=1)
    assert isinstance(model, DraftModel) and "ggml" in repr(model)
    source = DraftModel(model.decoder, model.vocabulary, stop_below=0.0)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    drafter = source.drafter()
    drafter.append([5, 6, 7, 8])
    for ahead in ([], [9], [10, 11]):
        assert drafter.propose(ahead, 3) == greedy(plain, [5, 6, 7, 8, *ahead], 3)[0]
    source.close()


async def test_in_its_thread_sequences_share_passes(source: DraftModel, plain: Any) -> None:
    guarded = GuardedSource(source, VOCABULARY)
    drafter = guarded.drafter()
    drafter.append([5, 6, 7])
    assert list((await drafter.propose([], 3, wait=60)).tokens) == greedy(plain, [5, 6, 7], 3)[0]
    assert not guarded.fallbacks
    drafter.close()
