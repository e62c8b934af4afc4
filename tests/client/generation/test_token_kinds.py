"""Streaming is decoding at once, in pieces: for every kind of tokenizer, texts and mere tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from swarmcore.client.generation.detokenizer import (
    IncrementalDetokenizer,
    StopStrings,
    TokenKinds,
    token_kinds,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("abcdefghijklmnopqrstuvwxyz.,!'")
TEXTS = ["a", "b", "ca", " ", "  ", "é", "日本", "🙂", "👩‍👩‍👧", ".", ",", " n't", " 's", "\n", "ﷺ", "\u0301"]


def fast(backend: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_fallback(*decoder: Any) -> PreTrainedTokenizerFast:
    """Characters that are no tokens come as bytes, as with Llama 2, Mistral and Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁▁", "▁ab", *LETTERS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *decoder])
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    words = ["▁", "▁a", "▁▁▁", "b", "▁hello", ".", ",", "é", "🙂", "\ufffd"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in words), *((b, -9.0) for b in BYTES)]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(backend, unk_token="<unk>", eos_token="</s>")


def word_piece(cleanup: bool) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "hello", "##ing", "##s", ".", ",", "'", "n", "##'", "t", "s", "a", "don"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return fast(backend, unk_token="[UNK]", cls_token="[CLS]")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>"]})
    tokenizer.add_tokens(["▁日x", " word", "é🙂"])
    return tokenizer


def words_only() -> PreTrainedTokenizerFast:
    return fast(Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>")), unk_token="<unk>")


def word_ends() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"a</w>": 0, "b": 1, "c</w>": 2}, []))
    backend.decoder = decoders.BPEDecoder()
    return fast(backend)


KINDS = {
    "legacy sentencepiece": byte_fallback(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "byte fallback": byte_fallback(decoders.Fuse()),
    "unigram": unigram(),
    "byte level": byte_level(),
    "word piece": word_piece(cleanup=False),
    "word piece, cleaned up": word_piece(cleanup=True),
    "words": words_only(),
    "word ends": word_ends(),
}
TEXTUAL = ["legacy sentencepiece", "byte fallback", "byte level"]
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


class Counted:
    """Decodes, and counts what it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.tokens = 0

    def __call__(self, tokens: list[int]) -> str:
        self.tokens += len(tokens)
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def pieces_of(
    decode: Counted, tokens: Sequence[int], context: Sequence[int] = (), known: bool = True
) -> list[str]:
    stream = IncrementalDetokenizer(decode, context, token_kinds(decode.tokenizer, decode) if known else None)
    return [*map(stream.push, tokens), stream.finish()]


def random_tokens(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Any at all, or a few again and again; some have no token."""
    pool = range(len(tokenizer) + 2)
    if rng.random() < 0.5:
        pool = [rng.choice(pool) for _ in range(6)]
    return [rng.choice(pool) for _ in range(rng.choice([3, 20, 90]))]


@kinds
@pytest.mark.parametrize("seed", range(2))
def test_any_tokens_say_what_decoding_them_at_once_says(tokenizer, seed: int) -> None:
    rng, decode = random.Random(seed), Counted(tokenizer)
    for _ in range(30):
        tokens = random_tokens(tokenizer, rng)
        assert "".join(pieces_of(decode, tokens)) == decode(tokens)
        seam = rng.randrange(len(tokens))
        before, whole = decode(tokens[:seam]), decode(tokens)
        said = "".join(pieces_of(decode, tokens[seam:], tokens[:seam]))
        if whole.startswith(before):
            assert said == whole[len(before) :]


@pytest.mark.parametrize("tokenizer", [KINDS[name] for name in TEXTUAL], ids=TEXTUAL)
@pytest.mark.parametrize("known", [True, False])
def test_texts_are_said_as_they_are(tokenizer, known: bool) -> None:
    rng, decode = random.Random(1), Counted(tokenizer)
    for _ in range(50):
        text = "".join(rng.choice(TEXTS) for _ in range(rng.choice([3, 15, 40])))
        tokens = tokenizer(text)["input_ids"]
        assert "".join(pieces_of(decode, tokens, known=known)) == decode(tokens)
        seam = rng.randrange(len(tokens))
        before, whole = decode(tokens[:seam]), decode(tokens)
        if whole.startswith(before):
            assert "".join(pieces_of(decode, tokens[seam:], tokens[:seam], known)) == whole[len(before) :]


def of_bytes(tokenizer: PreTrainedTokenizerFast, text: bytes) -> list[int]:
    names = byte_level_names() if tokenizer is KINDS["byte level"] else BYTES
    return [tokenizer.convert_tokens_to_ids(names[byte]) for byte in text]


def byte_level_names() -> dict[int, str]:
    """The characters for which byte-level tokenizers write bytes."""
    names = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in names]
    return names | {byte: chr(256 + i) for i, byte in enumerate(others)}


LEGACY = KINDS["legacy sentencepiece"]


def test_a_run_of_bytes_is_said_when_it_is_certain() -> None:
    tokens = [*of_bytes(LEGACY, "é🙂".encode()), LEGACY.convert_tokens_to_ids("a")]
    assert pieces_of(Counted(LEGACY), tokens) == ["", "", "", "", "", "", "é🙂a", ""]
    invalid = [*of_bytes(LEGACY, "é".encode() + b"\x80\x80\x41"), LEGACY.convert_tokens_to_ids("a")]
    bad = "\ufffd"
    assert pieces_of(Counted(LEGACY), invalid) == ["", "", 3 * bad, bad, bad, "a", ""]


def test_special_tokens_within_a_character_are_passed_over() -> None:
    tokens = of_bytes(LEGACY, "é".encode())
    assert "".join(pieces_of(Counted(LEGACY), [tokens[0], 2, 9999, tokens[1]])) == "é"


def test_a_character_that_the_prompt_begins_is_the_answers() -> None:
    first, second = of_bytes(LEGACY, "é".encode())
    a = LEGACY.convert_tokens_to_ids("a")
    assert pieces_of(Counted(LEGACY), [second, a], [a, first]) == ["", "éa", ""]
    assert pieces_of(Counted(LEGACY), [a], [a, first]) == ["a", ""], (
        "what the prompt left broken is the prompt's"
    )
    assert pieces_of(Counted(LEGACY), [first], [a, first, second]) == ["", "\ufffd"]


@pytest.mark.parametrize(
    "unit", [b"\x80", b"\xc3", "é".encode(), "👩‍👩‍👧".encode(), b"ab\x80", b"\xf0\x9f", None], ids=str
)
@pytest.mark.parametrize("tokenizer", [KINDS[name] for name in TEXTUAL], ids=TEXTUAL)
def test_the_time_for_a_token_does_not_grow(tokenizer, unit: bytes | None) -> None:
    """Counted in tokens that are decoded again."""
    costs = []
    for size in (200, 800):
        decode = Counted(tokenizer)
        if unit is None:
            tokens = [tokenizer.all_special_ids[0]] * size
        else:
            tokens = of_bytes(tokenizer, unit) * (size // len(unit))
        said = pieces_of(decode, tokens)
        costs.append(decode.tokens / size)
        assert "".join(said) == Counted(tokenizer)(tokens)
    assert costs[1] < 1.5 * costs[0] + 1


def test_bytes_that_are_no_character_are_said_while_they_come() -> None:
    tokenizer = KINDS["byte level"]
    for known in (True, False):
        said = pieces_of(Counted(tokenizer), of_bytes(tokenizer, b"\x80" * 30), known=known)
        assert sum(map(bool, said)) > 20


def test_what_no_later_token_can_change_is_said() -> None:
    """Nothing is held that all continuations have in common."""
    for name, tokenizer in KINDS.items():
        rng, decode = random.Random(4), Counted(tokenizer)
        for _ in range(15):
            tokens = random_tokens(tokenizer, rng)[:12]
            said = "".join(pieces_of(decode, tokens)[:-1])
            more = [[rng.randrange(len(tokenizer)) for _ in range(3)] for _ in range(120)]
            certain = common_beginning([decode(tokens), *(decode([*tokens, *end]) for end in more)])
            assert certain.startswith(said), (name, tokens)
            assert certain[len(said) :] in ("", *("\ufffd" * n for n in (1, 2, 3))), (name, tokens)


def common_beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    size = next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first[:size]


@pytest.mark.parametrize("seed", range(8))
def test_stop_strings_within_runs_and_across_tokens(seed: int) -> None:
    rng, decode = random.Random(seed), Counted(LEGACY)
    text = "".join(rng.choice(TEXTS) for _ in range(30)).strip()
    tokens = LEGACY(text)["input_ids"]
    whole = decode(tokens)
    at = rng.randrange(len(whole) - 3)
    stop = whole[at : at + rng.randint(1, 3)]
    stops, said = StopStrings([stop]), ""
    for piece in pieces_of(decode, tokens):
        more, met = stops.push(piece)
        said += more
        if met:
            break
    assert said == whole[: whole.index(stop)]


def test_kinds_of_tokens() -> None:
    assert len(token_kinds(LEGACY, Counted(LEGACY)).run_bytes) == 256
    level = KINDS["byte level"]
    known = token_kinds(level, Counted(level))
    assert not known.run_bytes
    special = level.convert_tokens_to_ids("<|s|>")
    assert [known.silent(token) for token in (256, special, 5, 10**6)] == [True, True, False, True]
    assert not TokenKinds().silent(256)


@kinds
async def test_a_generated_text_is_that_of_its_tokens(model, tokenizer) -> None:
    """The model has 257 tokens; some of these tokenizers have fewer, some have more."""
    model.tokenizer = tokenizer
    decode = Counted(tokenizer)
    prompts = [[3, 4], [2, 1, 5], [0]]
    options = {"max_new_tokens": 40, "temperature": 9.0, "min_new_tokens": 40}
    for seed in range(2):
        batch = model.generate_batch(prompts, seed=seed, **options)
        texts = await batch
        for prompt, tokens, text in zip(prompts, batch.tokens, texts, strict=True):
            before, whole = decode(prompt), decode([*prompt, *tokens])
            assert not whole.startswith(before) or text == whole[len(before) :]
