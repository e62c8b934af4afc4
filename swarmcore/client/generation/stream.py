"""Generated text as its reader has it: pieces as they come, and how it goes. Whatever it is made by."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import attrs

from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.types import Numerics

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the text; a stop string was met; ``max_new_tokens``, or all the model takes, is there."""

Piece = TypeVar("Piece")


@attrs.define(eq=False, kw_only=True)
class GeneratedText:
    """One text, kept up to date by whatever generates it."""

    tokens: list[int] = attrs.field(factory=list)
    """The generated tokens, the one that ended the text included."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that servers had computed before."""
    numerics: tuple[Numerics, ...] = ()
    """How servers computed, by what the generation server said of them at the end."""
    finish_reason: FinishReason | None = None


class GenerationStream(ABC, Generic[Piece]):
    """An asynchronous iterator over pieces of texts; it can be closed before its end.

    It starts with the first piece that is asked for. Leaving its loop early ends it; so does `aclose`.
    """

    def __init__(self, texts: Sequence[GeneratedText], pieces: AsyncGenerator[tuple[int, str], None]) -> None:
        """``pieces`` yields ``(index of the text, piece of it)``, and keeps ``texts`` up to date.

        It must not know this object: when the last reference to that goes, in the middle of a loop that was
        left, the event loop then closes the generator at once.
        """
        self._texts = texts
        self._pieces = pieces
        self._now: Callable[[], float] = float
        """The clock of the event loop that it runs on, once it runs."""
        self._started: float | None = None
        self._first_token: float | None = None
        self._ended: float | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._started is None:
            self._now = asyncio.get_running_loop().time
            self._started = self._now()
        try:
            index, text = await anext(self._pieces)
        except BaseException:
            self._end()
            raise
        if self._first_token is None:
            self._first_token = self._now()
        return self._piece(index, text)

    async def aclose(self) -> None:
        """End it here, and release what was opened for it. Harmless when it has ended."""
        await self._pieces.aclose()
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, of all texts."""
        return sum(len(text.tokens) for text in self._texts)

    @property
    def seconds(self) -> float:
        """From the start to the end, or to now; by the event loop's clock."""
        if self._started is None:
            return 0.0
        return (self._now() if self._ended is None else self._ended) - self._started

    @property
    def first_token_seconds(self) -> float | None:
        """From the start to the first piece of text; None before it."""
        if self._started is None or self._first_token is None:
            return None
        return self._first_token - self._started

    def __repr__(self) -> str:
        reasons: set[str] = {text.finish_reason or "running" for text in self._texts}
        state = "not started" if self._started is None else ", ".join(sorted(reasons)) or "running"
        return f"<{type(self).__name__} {self.new_tokens} tokens · {state} · {self._made_by}>"

    @abstractmethod
    def _piece(self, index: int, text: str) -> Piece: ...

    @property
    @abstractmethod
    def _made_by(self) -> str: ...

    def _end(self) -> None:
        if self._started is not None and self._ended is None:
            self._ended = self._now()


class TextStream(GenerationStream[str]):
    """The pieces of one text. Awaited, it is the whole text, or what is left of it."""

    def __init__(self, text: GeneratedText, pieces: AsyncGenerator[tuple[int, str], None]) -> None:
        super().__init__([text], pieces)
        self._text = text

    def __await__(self) -> Generator[Any, None, str]:
        return self._whole().__await__()

    @property
    def tokens(self) -> list[int]:
        """The tokens generated so far, the one that ended the text included."""
        return list(self._text.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 before it starts."""
        return self._text.prompt_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._text.finish_reason

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of its session have computed, each way once; nothing as long as that is not known.
        With more than one the text may differ from what servers of either make alone, from a near tie on."""
        return self._text.numerics

    @property
    def speculation(self) -> SpeculationCounts:
        """What drafts have brought so far; nothing where a generation server makes the text."""
        return SpeculationCounts()

    def _piece(self, index: int, text: str) -> str:
        return text

    async def _whole(self) -> str:
        return "".join([piece async for piece in self])
