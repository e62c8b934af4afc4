"""Generated text: steps through the swarm, tokens chosen here, text as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import attrs

from swarmcore.client.generation.compute import ModelCompute
from swarmcore.client.generation.continuation import Continuation
from swarmcore.client.generation.decode_loop import DecodeLoop
from swarmcore.client.generation.stream import FinishReason, GeneratedText, GenerationStream, TextStream
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.client.speculation.drafting import Drafting
from swarmcore.client.speculation.speculator import Speculator
from swarmcore.generation_settings import Speculation
from swarmcore.routing.chain import Chain
from swarmcore.types import Numerics


@attrs.define(eq=False)
class GenerationRun:
    """How a generation goes, kept up to date while it runs."""

    texts: list[GeneratedText]
    chain: Chain = attrs.field(factory=lambda: Chain(()))
    numerics: tuple[Numerics, ...] = ()
    """How the servers of its session have computed so far, each way once."""
    speculation: SpeculationCounts = attrs.field(factory=SpeculationCounts)


async def generate_pieces(
    run: GenerationRun,
    compute: ModelCompute,
    prepare: Callable[[], Awaitable[list[Continuation]]],
    session: ModelSession | None,
    open_session: Callable[[list[Continuation]], ModelSession],
    speculator: Speculator,
    speculation: Speculation | None,
) -> AsyncGenerator[tuple[int, str], None]:
    """Generate for all prompts together; yield ``(index of the prompt, piece of its text)``.

    A session opened here is closed at the end, however it ends; one that was given is left open. Without
    ``speculation`` nothing is drafted.
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
            draftings, controller = list[Drafting](), None
            if speculation is not None:
                draftings = [speculator.drafting(speculation, owner=used.namespace) for _ in prompts]
                deciding = speculator.deciding(speculation, stages=len(used.chain.stages))
                controller = stack.enter_context(deciding)
            loop = DecodeLoop(continuations, compute, used, run.speculation, draftings, controller)
            with compute.generating(run.speculation):
                async with aclosing(loop.pieces(prompts)) as pieces:
                    async for found in pieces:
                        yield found
            run.chain, run.numerics = used.chain, used.numerics
            await used.name_pages()


class _OverSession:
    """What there is to see of a generation that runs in a session."""

    _run: GenerationRun

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
    def speculation(self) -> SpeculationCounts:
        """What drafts have brought it so far: tokens a step, how many were right, whose they were."""
        return self._run.speculation

    @property
    def _made_by(self) -> str:
        return str(self.chain)


class Generation(_OverSession, TextStream):
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


class BatchGeneration(_OverSession, GenerationStream[tuple[int, str]]):
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

    def _piece(self, index: int, text: str) -> tuple[int, str]:
        return index, text

    async def _whole(self) -> list[str]:
        pieces = [found async for found in self]
        return ["".join(p for i, p in pieces if i == index) for index in range(len(self._texts))]
