"""Tokens to text, piece by piece, and stop strings."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from swarmcore.client.generation.detokenizer import IncrementalDetokenizer, StopStrings

SENTENCEPIECE = {
    "<unk>": 0,
    **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)},
    **{
        word: 300 + i for i, word in enumerate(["▁Hello", "▁world", "▁", "a", "b", ",", "▁the", "ing", "▁日"])
    },
}


def sentencepiece_decode():
    """The decoder of Llama 2's tokenizer: spaces belong to words, the first of a text is taken away."""
    tokenizer = Tokenizer(models.BPE(SENTENCEPIECE, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer.decode


def stream(decode, tokens, context=()):
    text = IncrementalDetokenizer(decode, context)
    return [*map(text.push, tokens), text.finish()]


def of(*words: str) -> list[int]:
    return [SENTENCEPIECE[word] for word in words]


def of_bytes(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


def test_words_keep_their_spaces():
    assert stream(sentencepiece_decode(), of("▁Hello", "▁world", "▁", "a")) == [
        "Hello",
        " world",
        " ",
        "a",
        "",
    ]


def test_a_continued_text_keeps_the_space_at_its_seam():
    decode = sentencepiece_decode()
    assert stream(decode, of("▁world"), of("▁Hello", ","))[0] == " world"
    assert stream(decode, of("ing"), of("▁Hello"))[0] == "ing"
    assert stream(decode, of("▁world"))[0] == "world", "at the beginning of an answer there is none"


def test_characters_come_whole():
    pieces = stream(sentencepiece_decode(), [*of("▁Hello"), *of_bytes("é日😀"), *of("a")])
    assert pieces == ["Hello", "", "é", "", "", "日", "", "", "", "😀", "a", ""]


def test_a_character_that_is_never_completed():
    pieces = stream(sentencepiece_decode(), [*of("▁Hello"), *of_bytes("日")[:2]])
    assert "".join(pieces) == "Hello\ufffd\ufffd"
    assert pieces[-1] == "\ufffd\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_make_up_the_whole(seed: int):
    rng = random.Random(seed)
    decode = sentencepiece_decode()
    tokens: list[int] = []
    for _ in range(60):
        word = rng.choice(["▁Hello", "▁the", "a", ",", "ing", "▁日", "é", "😀", "\n"])
        tokens += of(word) if word in SENTENCEPIECE else of_bytes(word)
    assert "".join(stream(decode, tokens)) == decode(tokens)
    seam = rng.randrange(6, 50)
    while "\ufffd" in decode(tokens[seam - 6 : seam]):
        seam -= 1
    pieces = stream(decode, tokens[seam:], tokens[seam - 6 : seam])
    assert decode(tokens[:seam]) + "".join(pieces) == decode(tokens)


def test_decoding_does_not_grow_with_the_text():
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return "x" * len(tokens)

    assert "".join(stream(decode, [1] * 500)) == "x" * 500
    assert longest <= 32


def test_a_decoder_that_takes_spaces_back_loses_nothing_else():
    def decode(tokens: list[int]) -> str:
        return "".join(map(chr, tokens)).replace(" .", ".")

    said = "".join(stream(decode, list(map(ord, "one . two " * 9 + "."))))
    assert said == "one . two " * 9 + "."


def stopped(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What is said after each piece, up to a stop string or the end."""
    filter_, said = StopStrings(stops), []
    for piece in pieces:
        text, met = filter_.push(piece)
        said.append(text)
        if met:
            return said, True
    return [*said, filter_.finish()], False


def test_a_stop_string_split_over_pieces_never_leaks():
    assert stopped(["</end>"], ["ab<", "/e", "nd", ">cd"]) == (["ab", "", "", ""], True)
    assert stopped(["</end>"], ["ab<", "/e", "ven", " more"]) == (["ab", "", "</even", " more", ""], False)


def test_what_was_held_back_is_said_at_the_end():
    assert stopped(["\n\n"], ["one\n"]) == (["one", "\n"], False)


def test_the_first_of_several_stop_strings_counts():
    assert stopped(["cd", "bcx", "a!"], ["abcdef"]) == (["ab"], True)
    assert stopped(["cd", "bc"], ["abcdef"]) == (["a"], True)


def test_without_stop_strings_text_passes_through():
    assert stopped([], ["a", "b"]) == (["a", "b", ""], False)


@pytest.mark.parametrize("seed", range(50))
def test_any_split_says_the_same(seed: int):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(40))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 7))) for _ in range(2)]
    at = [text.index(stop) for stop in stops if stop in text]
    pieces, rest = [], text
    while rest:
        size = rng.randint(1, 5)
        pieces.append(rest[:size])
        rest = rest[size:]
    said, met = stopped(stops, pieces)
    assert met == bool(at)
    # A longer stop string that begins earlier may be complete only after a shorter one is.
    assert "".join(said) in {text[:start] for start in at} if at else "".join(said) == text
