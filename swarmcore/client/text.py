"""Tokens to text, piece by piece: characters that span tokens, and stop strings that span pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Text of some tokens, special tokens left out."""

_CUT_CHARACTER = "\ufffd"


class TextStream:
    """Text of a growing sequence of tokens.

    A token is decoded together with those of the piece before it, since what it is worth depends on them: a
    SentencePiece token has its space only inside a text, a byte is no character alone. ``context`` are tokens
    that the text continues. The pieces together are what decoding all tokens at once gives.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(context)
        self._said = len(self._tokens)
        self._said_text = decode(self._tokens) if self._tokens else ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is not whole."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(_CUT_CHARACTER) or len(text) <= len(self._said_text):
            return ""
        piece = text[len(self._said_text) :]
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        self._said_text = self._decode(self._tokens)
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come, with U+FFFD for a character that was never completed."""
        return self._decode(self._tokens)[len(self._said_text) :] if len(self._tokens) > self._said else ""


class StopStrings:
    """Ends a text before the first of some strings, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be said of the text up to here, and whether a stop string was met."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        met = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            self._held = ""
            return text[: min(met)], True
        keep = max(map(len, self._stops)) - 1
        start = next(
            (i for i in range(max(0, len(text) - keep), len(text)) if self._may_begin(text[i:])), len(text)
        )
        self._held = text[start:]
        return text[:start], False

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
