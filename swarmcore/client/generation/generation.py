"""Generated text: steps through the swarm, tokens chosen here, text as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack
from typing import Any

import attrs

from swarmcore.client.generation.compute import ModelCompute
from swarmcore.client.generation.detokenizer import IncrementalDetokenizer, StopStrings
from swarmcore.client.generation.sampling import Sampler
from swarmcore.client.generation.stream import FinishReason, GeneratedText, GenerationStream, TextStream
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.prompts import EncodedPrompt
from swarmcore.routing.chain import Chain
from swarmcore.types import Numerics


@attrs.define(eq=False)
class Continuation:
    """What is generated for one prompt. A plain object: tokens go in, text comes out."""

    generated: GeneratedText
    prompt: EncodedPrompt
    max_length: int
    """Tokens, prompt included, at which it ends."""
    eos: frozenset[int]
    sampler: Sampler = attrs.field(repr=False)
    detokenizer: IncrementalDetokenizer = attrs.field(repr=False)
    stops: StopStrings = attrs.field(repr=False)

    @property
    def tokens(self) -> list[int]:
        return self.generated.tokens

    @property
    def finished(self) -> bool:
        return self.generated.finish_reason is not None

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.tokens)

    def take(self, token: int) -> str:
        """Go on with ``token``; return the text that is certain now."""
        self.tokens.append(token)
        self.sampler.append(token)
        if token in self.eos:
            self.generated.finish_reason = "eos"
            return self._rest()
        piece, stopped = self.stops.push(self.detokenizer.push(token))
        if stopped:
            self.generated.finish_reason = "stop"
        elif self.length >= self.max_length:
            self.generated.finish_reason = "length"
            piece += self._rest()
        return piece

    def _rest(self) -> str:
        piece, stopped = self.stops.push(self.detokenizer.finish())
        if stopped:
            self.generated.finish_reason = "stop"
            return piece
        return piece + self.stops.finish()


@attrs.define(eq=False)
class GenerationRun:
    """How a generation goes, kept up to date while it runs."""

    texts: list[GeneratedText]
    chain: Chain = attrs.field(factory=lambda: Chain(()))
    numerics: tuple[Numerics, ...] = ()
    """How the servers of its session have computed so far, each way once."""


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
    continuations = await prepare()
    if all(continuation.finished for continuation in continuations):
        return
    prompts = [continuation.prompt.tokens + continuation.tokens for continuation in continuations]
    async with AsyncExitStack() as stack:
        used = session
        if used is None:
            used = open_session(continuations)
            stack.push_async_callback(used.close)
        with used.exclusive():
            await used.open(prompts)
            run.chain, run.numerics = used.chain, used.numerics
            with compute.generating(run):
                async for found in _steps(run, continuations, prompts, compute, used):
                    yield found
            run.chain, run.numerics = used.chain, used.numerics
            await used.name_pages()


async def _steps(
    run: GenerationRun,
    continuations: list[Continuation],
    prompts: list[list[int]],
    compute: ModelCompute,
    session: ModelSession,
) -> AsyncGenerator[tuple[int, str], None]:
    last_position = (compute.parts.max_positions or 2**62) - 1
    new = session.reuse_prefix(prompts)
    hidden = await session.embed(new)
    running = list(enumerate(continuations))
    output = await session.step_embedded(new, hidden)
    for continuation, prompt, sent, cached in zip(continuations, prompts, new, session.cached, strict=True):
        continuation.generated.cached_tokens = len(prompt) - len(sent) + cached
    while True:
        tokens, hidden = await compute.next_tokens(
            output,
            [continuation.sampler for _, continuation in running],
            # A token that ends its text at the model's limit is embedded too, and thrown away.
            [min(session.offset + continuation.length, last_position) for _, continuation in running],
            run,
        )
        pieces = [continuation.take(token) for (_, continuation), token in zip(running, tokens, strict=True)]
        for (index, _), piece in zip(running, pieces, strict=True):
            if piece:
                yield index, piece
        rows = [row for row, (_, continuation) in enumerate(running) if not continuation.finished]
        if len(rows) < len(running):
            running = [running[row] for row in rows]
            hidden = hidden[rows]
        if not running:
            return
        new = [[] if c.finished else c.tokens[-1:] for c in continuations]
        output = await session.step_embedded(new, hidden)


class Generation(TextStream):
    """Text that is being generated: ``async for piece in model.generate(…)``, or awaited as a whole.

    It starts with the first piece that is asked for, and goes no faster than its pieces are taken. Leaving
    the loop early ends it, and closes the session that was opened for it; so does `aclose`, which waits for
    that.
    """

    def __init__(self, run: GenerationRun, pieces: AsyncGenerator[tuple[int, str], None]) -> None:
        super().__init__(run.texts[0], pieces)
        self._run = run

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that servers had computed before, in its session or an earlier one."""
        return self._text.cached_tokens

    @property
    def chain(self) -> Chain:
        """The servers that it passes through."""
        return self._run.chain

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of its session have computed, each way once. With more than one the text may differ
        from what servers of either make alone, from a near tie on."""
        return self._run.numerics

    @property
    def _made_by(self) -> str:
        return str(self.chain)


class BatchGeneration(GenerationStream[tuple[int, str]]):
    """Texts of several prompts, generated together: ``async for index, piece in model.generate_batch(…)``.

    Or awaited as a whole, for a list of texts. Otherwise as `Generation`.
    """

    def __init__(self, run: GenerationRun, pieces: AsyncGenerator[tuple[int, str], None]) -> None:
        super().__init__(run.texts, pieces)
        self._run = run

    def __await__(self) -> Generator[Any, None, list[str]]:
        """The whole text of each prompt, or what is left of it, in the order of the prompts."""
        return self._whole().__await__()

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens generated so far for each prompt, the one that ended its text included."""
        return [list(text.tokens) for text in self._texts]

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each prompt; 0 before it starts."""
        return [text.prompt_tokens for text in self._texts]

    @property
    def cached_tokens(self) -> list[int]:
        """Tokens of each prompt that servers had computed before."""
        return [text.cached_tokens for text in self._texts]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each text ended; None while it has not."""
        return [text.finish_reason for text in self._texts]

    @property
    def chain(self) -> Chain:
        """The servers that it passes through."""
        return self._run.chain

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of its session have computed, each way once. With more than one the text may differ
        from what servers of either make alone, from a near tie on."""
        return self._run.numerics

    @property
    def _made_by(self) -> str:
        return str(self.chain)

    def _piece(self, index: int, text: str) -> tuple[int, str]:
        return index, text

    async def _whole(self) -> list[str]:
        pieces = [found async for found in self]
        return ["".join(p for i, p in pieces if i == index) for index in range(len(self._texts))]
