"""Generated text: steps through the swarm, tokens chosen here, text as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import attrs

from swarmcore.client.generation.compute import ModelCompute
from swarmcore.client.generation.detokenizer import GeneratedPieces, StopStrings, TextStream
from swarmcore.client.generation.sampling import TokenChooser
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.prompts import EncodedPrompt
from swarmcore.routing.chain import Chain

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the text; a stop string was met; ``max_new_tokens``, or all the model takes, is there."""

Piece = TypeVar("Piece")


@attrs.define(eq=False)
class Continuation:
    """What is generated for one prompt. A plain object: tokens go in, text comes out."""

    prompt: EncodedPrompt
    max_length: int
    """Tokens, prompt included, at which it ends."""
    eos: frozenset[int]
    chooser: TokenChooser = attrs.field(repr=False)
    text: TextStream = attrs.field(repr=False)
    stops: StopStrings = attrs.field(repr=False)
    tokens: list[int] = attrs.field(factory=list)
    """The generated tokens, the one that ended the text included."""
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.tokens)

    def take(self, token: int) -> str:
        """Go on with ``token``; return the text that is certain now."""
        self.tokens.append(token)
        self.chooser.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
            return self._rest()
        piece, stopped = self.stops.push(self.text.push(token))
        if stopped:
            self.finish_reason = "stop"
        elif self.length >= self.max_length:
            self.finish_reason = "length"
            piece += self._rest()
        return piece

    def _rest(self) -> str:
        piece, stopped = self.stops.push(self.text.finish())
        if stopped:
            self.finish_reason = "stop"
            return piece
        return piece + self.stops.finish()


@attrs.define(eq=False)
class GenerationRun:
    """How a generation went, kept up while it runs."""

    continuations: list[Continuation] = attrs.field(factory=list)
    chain: Chain = attrs.field(factory=lambda: Chain(()))
    now: Callable[[], float] | None = None
    """The clock of the loop that it runs on, by which these times are."""
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None


async def generate_pieces(
    run: GenerationRun,
    compute: ModelCompute,
    prepare: Callable[[], Awaitable[list[Continuation]]],
    session: ModelSession | None,
    open_session: Callable[[list[Continuation]], ModelSession],
) -> AsyncGenerator[tuple[int, str], None]:
    """Generate for all prompts together; yield ``(index of the prompt, piece of its text)``.

    A session opened here is closed at the end, however it ends; one that was given is left open.
    """
    run.now = now = asyncio.get_running_loop().time
    run.started = now()
    try:
        run.continuations = await prepare()
        if all(continuation.finish_reason for continuation in run.continuations):
            return
        async with open_session(run.continuations) if session is None else nullcontext(session) as used:
            with used.used():
                run.chain = used.chain
                async for found in _steps(run, compute, used):
                    run.first_token = run.first_token or now()
                    yield found
                run.chain = used.chain
    finally:
        run.ended = now()


async def _steps(
    run: GenerationRun, compute: ModelCompute, session: ModelSession
) -> AsyncGenerator[tuple[int, str], None]:
    continuations = run.continuations
    last_position = (compute.parts.max_positions or 2**62) - 1
    new = session.reuse([continuation.prompt.tokens + continuation.tokens for continuation in continuations])
    hidden = await session.embed(new)
    running = list(enumerate(continuations))
    while running:
        output = await session.step_embedded(new, hidden)
        tokens, hidden = await compute.next_tokens(
            output,
            [continuation.chooser for _, continuation in running],
            # A token that ends its text at the model's limit is embedded too, and thrown away.
            [min(session.offset + continuation.length, last_position) for _, continuation in running],
        )
        pieces = [continuation.take(token) for (_, continuation), token in zip(running, tokens, strict=True)]
        for (index, _), piece in zip(running, pieces, strict=True):
            if piece:
                yield index, piece
        rows = [row for row, (_, continuation) in enumerate(running) if not continuation.finish_reason]
        if len(rows) < len(running):
            running = [running[row] for row in rows]
            hidden = hidden[rows]
        new = [[] if c.finish_reason else c.tokens[-1:] for c in continuations]


class _GenerationBase(GeneratedPieces[Piece]):
    """Pieces of a `GenerationRun`. Closing it closes the session that was opened for it."""

    def __init__(self, run: GenerationRun, pieces: AsyncGenerator[Piece, None]) -> None:
        super().__init__(pieces)
        self._run = run

    @property
    def seconds(self) -> float:
        """From the start to the end, or to now; by the event loop's clock."""
        run = self._run
        if run.started is None or run.now is None:
            return 0.0
        return (run.now() if run.ended is None else run.ended) - run.started

    @property
    def first_token_seconds(self) -> float | None:
        """From the start to the first piece of text; None before it."""
        run = self._run
        return None if run.started is None or run.first_token is None else run.first_token - run.started

    @property
    def chain(self) -> Chain:
        """The servers that it passes through."""
        return self._run.chain

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, over all prompts."""
        return sum(len(continuation.tokens) for continuation in self._run.continuations)

    def __repr__(self) -> str:
        reasons: set[str] = {c.finish_reason or "running" for c in self._run.continuations}
        state = ", ".join(sorted(reasons)) or "not started"
        return f"<{type(self).__name__} {self.new_tokens} tokens · {state} · {self.chain}>"


class Generation(_GenerationBase[str]):
    """Text that is being generated: ``async for piece in model.generate(…)``, or awaited as a whole.

    It starts with the first piece that is asked for, and goes no faster than its pieces are taken. Leaving
    the loop early ends it; so does `aclose`, which waits for that.
    """

    def __init__(self, run: GenerationRun, pieces: AsyncGenerator[tuple[int, str], None]) -> None:
        super().__init__(run, _texts_only(pieces))

    def __await__(self) -> Generator[Any, None, str]:
        """The whole text, or what is left of it."""
        return self._text().__await__()

    async def _text(self) -> str:
        return "".join([piece async for piece in self])

    @property
    def tokens(self) -> list[int]:
        """The tokens generated so far, the one that ended the text included."""
        return list(self._run.continuations[0].tokens) if self._run.continuations else []

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 before it starts."""
        return len(self._run.continuations[0].prompt.tokens) if self._run.continuations else 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._run.continuations[0].finish_reason if self._run.continuations else None


class BatchGeneration(_GenerationBase[tuple[int, str]]):
    """Texts of several prompts, generated together: ``async for index, piece in model.generate_batch(…)``.

    Or awaited as a whole, for a list of texts. Otherwise as `Generation`.
    """

    def __await__(self) -> Generator[Any, None, list[str]]:
        """The whole text of each prompt, or what is left of it, in the order of the prompts."""
        return self._texts().__await__()

    async def _texts(self) -> list[str]:
        pieces = [found async for found in self]
        return ["".join(p for i, p in pieces if i == index) for index in range(len(self._run.continuations))]

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens generated so far for each prompt, the one that ended its text included."""
        return [list(continuation.tokens) for continuation in self._run.continuations]

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(continuation.prompt.tokens) for continuation in self._run.continuations]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each text ended; None while it has not."""
        return [continuation.finish_reason for continuation in self._run.continuations]


async def _texts_only(pieces: AsyncGenerator[tuple[int, str], None]) -> AsyncGenerator[str, None]:
    try:
        async for _, piece in pieces:
            yield piece
    finally:
        await pieces.aclose()
