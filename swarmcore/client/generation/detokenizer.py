"""Tokens to text, piece by piece: characters that span tokens, and stop strings that span pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Decode = Callable[[list[int]], str]
"""Text of some tokens, special tokens left out."""

_CUT = "\ufffd"
"""What decoders put in the place of bytes that are no character, or not yet one."""

_LONGEST = 4
"""Bytes of the longest character, so tokens that it spans at most."""

_WINDOW = 16
"""Tokens above which those that no later one depends on are not decoded again."""


@attrs.frozen
class TokenKinds:
    """What decoding does to single tokens beyond putting their texts together."""

    run_bytes: Mapping[int, int] = attrs.field(factory=dict, repr=False)
    """The byte that a token stands for, where one that does not fit makes U+FFFD of all in its run: those of
    tokenizers with byte fallback, such as Llama 2's. Empty where only the bytes beside it suffer."""
    silent: Callable[[int], bool] = attrs.field(default=lambda token: False, repr=False)
    """Whether a token is left out: it is special, or the tokenizer has none of that id."""


def token_kinds(tokenizer: PreTrainedTokenizerBase, decode: Decode) -> TokenKinds:
    """The kinds of a tokenizer's tokens; ``decode`` makes its texts."""
    special = set(tokenizer.all_special_ids)
    added_tokens = getattr(tokenizer, "added_tokens_decoder", {})  # not of every kind of tokenizer
    special.update(token for token, added in added_tokens.items() if added.special)

    def silent(token: int) -> bool:
        if token in special:
            return not decode([token])
        try:
            return tokenizer.convert_ids_to_tokens(token) is None
        except (IndexError, KeyError, OverflowError, ValueError):
            return True

    return TokenKinds(_run_bytes(tokenizer, decode), silent)


def _run_bytes(tokenizer: PreTrainedTokenizerBase, decode: Decode) -> dict[int, int]:
    def token_of(byte: int) -> int | None:
        name = f"<0x{byte:02X}>"
        token = tokenizer.convert_tokens_to_ids(name)
        return token if isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == name else None

    broken = [token for byte in (*"é".encode(), 0x80) if (token := token_of(byte)) is not None]
    if len(broken) < 3 or decode(broken) != _CUT * 3:
        return {}
    return {token: byte for byte in range(256) if (token := token_of(byte)) is not None}


class IncrementalDetokenizer:
    """Text of a growing sequence of tokens: each piece as soon as no later token can change it.

    All pieces together are what decoding all tokens at once gives. The last tokens are decoded again with
    each new one, since what it is worth depends on them: a word has its space only inside a text, a byte is
    no character alone. How many they are does not grow with the text. ``context`` are tokens that the text
    continues; a character that they begin and the text completes is the text's.

    Without ``kinds`` it is right for every ``decode`` to which a byte matters only within its own character.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = (), kinds: TokenKinds | None = None) -> None:
        self._decode = decode
        self._kinds = kinds or TokenKinds()
        self._limit = _WINDOW
        self._run: codecs.IncrementalDecoder | None = None
        """Checks the bytes of the run that the tokens end with; None where they end with none."""
        self._run_broken = False
        self._pending = 0
        """Tokens of the run that nothing was emitted of."""
        self._unfinished = 0
        """Tokens since the text last ended with a whole character; only where there are no runs."""
        self._tokens: list[int] = []
        self._emitted = ""
        """Text of the tokens that is certain and emitted already."""
        self._shown = ""
        """As long as nothing is emitted, the context's text, with characters that it leaves unfinished."""
        self._take_context(context)

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; empty while a character, or a run of bytes, is not whole."""
        if self._kinds.silent(token):
            return ""
        byte = self._kinds.run_bytes.get(token)
        if byte is not None:
            return self._push_byte(token, byte)
        piece = self._end_run()
        self._tokens.append(token)
        text = self._decode(self._tokens)
        return piece + self._emit(text, self._certain(text))

    def finish(self) -> str:
        """What is left when no more tokens come, with U+FFFD for a character that was never completed."""
        piece = self._end_run()
        text = self._decode(self._tokens)
        return piece + self._emit(text, text)

    def _emit(self, text: str, certain: str) -> str:
        """What is new in ``certain``, the beginning of the tokens' ``text``."""
        begin = self._shown if text.startswith(self._shown) else self._emitted
        if not text.startswith(begin):
            if certain != text:
                return ""
            begin = _common(begin, text)  # a decoder that takes back what it gave, as some do with spaces
        if len(certain) <= len(begin):
            return ""
        self._emitted = self._shown = certain
        if len(self._tokens) > self._limit:
            self._shorten(text)
        return certain[len(begin) :]

    def _certain(self, text: str) -> str:
        if self._kinds.run_bytes:
            return text
        whole = text.rstrip(_CUT)
        self._unfinished = self._unfinished + 1 if len(whole) < len(text) else 0
        # A character would be whole by now: all but what may be the beginning of another is to stay.
        return whole if self._unfinished < _LONGEST else text[: max(len(whole), len(text) - (_LONGEST - 1))]

    def _push_byte(self, token: int, byte: int) -> str:
        if self._run_broken:
            return _CUT
        self._tokens.append(token)
        self._pending += 1
        self._run = self._run or codecs.getincrementaldecoder("utf-8")()
        begun = len(self._run.getstate()[0])
        try:
            self._run.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_broken = True
            return self._break_run(begun + 1)
        return ""

    def _break_run(self, last: int) -> str:
        """Emit what is pending of a run that is no text, as its ``last`` tokens show by themselves."""
        self._tokens = self._tokens[-last:]
        self._emitted = self._shown = self._decode(self._tokens)
        piece, self._pending = _CUT * self._pending, 0
        return piece

    def _end_run(self) -> str:
        """Emit what is pending of a run that is no text. Characters of one that is come with what follows."""
        run, broken = self._run, self._run_broken
        self._run, self._run_broken = None, False
        begun = len(run.getstate()[0]) if run is not None and not broken else 0
        piece = self._break_run(begun) if begun else ""
        self._pending = 0
        return piece

    def _take_context(self, context: Sequence[int]) -> None:
        """Begin with the last tokens of the context, as many as matter."""
        size = _WINDOW
        while True:
            tokens = [token for token in context[-size:] if not self._kinds.silent(token)]
            text = self._decode(tokens)
            start = self._cut(tokens, text)
            if size >= len(context) or (start and not text.startswith(_CUT)):
                break
            size *= 4  # it may have begun within a character, or a run
        first = _run_start(tokens, len(tokens), self._kinds.run_bytes)
        self._tokens = tokens[start:first]
        for token in tokens[first:]:
            self._push_byte(token, self._kinds.run_bytes[token])
        self._pending = 0
        if not self._run_broken and self._tokens:
            begun = len(self._run.getstate()[0]) if self._run is not None else 0
            self._shown = self._decode(self._tokens)
            self._emitted = self._decode(self._tokens[:-begun]) if begun else self._certain(self._shown)

    def _shorten(self, text: str) -> None:
        start = self._cut(self._tokens, text)
        emitted = len(self._emitted) - (len(text) - len(self._decode(self._tokens[start:])))
        if start == 0 or emitted < 0:
            self._limit = 2 * len(self._tokens)
            return
        self._tokens = self._tokens[start:]
        self._emitted = self._shown = self._emitted[len(self._emitted) - emitted :]
        self._limit = _WINDOW

    def _cut(self, tokens: Sequence[int], text: str) -> int:
        """Where near their end ``tokens``, whose text is ``text``, can be cut so that the text from there on
        stays what it was, whatever follows; 0 where that is not certain.

        Decoding drops space at the beginning of what it gets, so there has to be text that took the harm.
        Where a byte matters within its character only, a cut is between characters if no more of U+FFFD come
        of it, once what is behind it is longer than the rest of a character.
        """
        run_bytes = self._kinds.run_bytes
        least = 1 if run_bytes else _LONGEST
        places = [at for at in range(len(tokens) - 1, 0, -1) if not _within_run(tokens, at, run_bytes)]
        for at in places[:_WINDOW]:
            behind = self._decode(list(tokens[at:]))
            if len(behind) < least or not text.endswith(behind):
                continue
            start = _run_start(tokens, max(0, at - _WINDOW // 2), run_bytes)
            before, both = self._decode(list(tokens[start:at])), self._decode(list(tokens[start:]))
            space = both[len(before) : len(both) - len(behind)]
            if not space.strip() and both == before + space + behind:
                return at
        return 0


def _common(one: str, other: str) -> str:
    """The beginning that two texts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _within_run(tokens: Sequence[int], at: int, run_bytes: Mapping[int, int]) -> bool:
    return tokens[at] in run_bytes and tokens[at - 1] in run_bytes


def _run_start(tokens: Sequence[int], end: int, run_bytes: Mapping[int, int]) -> int:
    """Where the run of byte tokens right before ``end`` starts; ``end`` where there is none."""
    while end and tokens[end - 1] in run_bytes:
        end -= 1
    return end


class StopStrings:
    """Ends a text before the first of some strings, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be emitted of the text up to here, and whether a stop string was met."""
        if not self._stops:
            return piece, False
        text = self._pending + piece
        met = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            self._pending = ""
            return text[: min(met)], True
        keep = max(map(len, self._stops)) - 1
        start = next(
            (i for i in range(max(0, len(text) - keep), len(text)) if self._may_begin(text[i:])), len(text)
        )
        self._pending = text[start:]
        return text[:start], False

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._pending = self._pending, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
