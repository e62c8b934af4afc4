"""The records of the generate protocol: a generation server makes texts for clients that have no part of the
model.

One channel for each text. The client opens it with the prompt and the settings; the generation server answers
when the text's turn has come, then sends it piece by piece, then says how it ended. What a text is, its
tokens say: with those of one that broke off, another generation server goes on where it was.
"""

from __future__ import annotations

import attrs

from swarmcore.wire.framing import wire_tag

GENERATE = "/swarmcore/generate/1"

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_NGRAM = 64
"""Bounds on what costs a generation server time in every token."""

AHEAD = 64
"""Tokens that a generation server sends beyond those that the client says it has taken."""


@attrs.frozen
class ChatMessage:
    """What one side of a conversation said."""

    role: str
    """``"system"``, ``"user"``, ``"assistant"``, or what else the model's chat template knows."""
    content: str


@wire_tag("OpenGeneration")
@attrs.frozen
class OpenGeneration:
    """Client to generation server, first message: continue a text, or answer messages.

    Exactly one of ``text``, ``messages`` and ``tokens`` is the prompt. Settings are those of
    `swarmcore.generation_settings.GenerationSettings`, by the same names; None is the model's own.
    """

    model: str = ""
    """Fingerprint or name of the model; empty for the one that the peer generates for."""
    text: str | None = None
    messages: tuple[ChatMessage, ...] = ()
    tokens: tuple[int, ...] = ()
    so_far: tuple[int, ...] = ()
    """Tokens of the answer that the client has already, from a generation with the same prompt and settings;
    they count towards ``max_new_tokens``."""
    adapter: str = ""
    """Name of an adapter that servers have."""
    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    """None of them: the model's own."""
    seed: int | None = None
    default_length: bool = False
    """``max_new_tokens`` is nobody's wish: the text ends sooner where the model's own settings say so."""


@wire_tag("GenerationStarted")
@attrs.frozen
class GenerationStarted:
    """Generation server to client: the text's turn has come, and its prompt is understood."""

    fingerprint: str
    """Of the model that makes the text."""
    prompt_tokens: int


@wire_tag("TextPiece")
@attrs.frozen
class TextPiece:
    """Generation server to client: what is certain now of the text, and the tokens up to there that were not
    sent before."""

    text: str
    tokens: tuple[int, ...]


@wire_tag("TokensTaken")
@attrs.frozen
class TokensTaken:
    """Client to generation server: so many tokens, of this channel's, have been taken by whoever reads the
    text.

    The generation server stops `AHEAD` tokens beyond.
    """

    tokens: int


@wire_tag("GenerationEnded")
@attrs.frozen
class GenerationEnded:
    """Generation server to client, last message: the text is complete."""

    reason: str
    """``"eos"``, ``"stop"`` or ``"length"``."""
    tokens: tuple[int, ...] = ()
    """Tokens at the end that made no text, such as the one that ended it."""
    new_tokens: int = 0
    """Tokens of the whole answer, those the client came with included."""
    seconds: float = 0.0
    """Time that it took here, without waiting for its turn."""
    numerics: tuple[str, ...] = ()
    """How the servers have computed that its part was made with, `Numerics` as text, each way once."""
