"""Batches through many servers: micro-batches over several chains at once, each redone where a server fails.

Section 2.2 of the paper; how micro-batches are spread over servers is that of SWARM parallelism
(arXiv 2301.11913).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import attrs

from swarmcore.client.autograd import rpc
from swarmcore.client.autograd.limiter import Call, FairLimiter
from swarmcore.client.autograd.options import LEAST_IN_FLIGHT, MOST_IN_FLIGHT, PER_SERVER, PassOptions
from swarmcore.client.autograd.planner import BatchCodecs, BatchPlanner, PassKind, Work
from swarmcore.client.autograd.rpc import MicroBatch, as_computed
from swarmcore.client.session.opening import located
from swarmcore.client.session.planner import random_session_id
from swarmcore.errors import (
    InputError,
    InternalError,
    MissingBlocksError,
    SpanError,
    SwarmError,
    TooManyCallsError,
    UnknownCodecError,
)
from swarmcore.pacing import Backoff
from swarmcore.routing.chain import Stage
from swarmcore.routing.link_codec import TensorKind
from swarmcore.rpc.node import Node
from swarmcore.types import ModelInfo, PeerId, Span
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two attempts to find a server."""

WARN_EVERY = 10.0
"""Seconds between two warnings that batches wait."""

Result = TypeVar("Result")
Done = TypeVar("Done", rpc.ForwardResult, rpc.BackwardResult)


@attrs.frozen(eq=False)
class StageContext:
    """What is kept of a stage that a micro-batch went through, to go back through it."""

    stage: Stage
    inputs: Tensor
    kept_as: str
    """Under which name its server keeps activations; empty when it does not."""
    codec: str = "raw"
    """Of the inputs when they went there. Sent again, they have to become the same values."""


@attrs.frozen(eq=False)
class ForwardContext:
    """A micro-batch that has come through a span: what came out, and what is kept to go back.

    The context of `torch.autograd.Function`, for one micro-batch.
    """

    batch: MicroBatch
    stages: tuple[StageContext, ...]
    outputs: Tensor


@attrs.frozen(eq=False)
class InputGradients:
    """Gradients of a micro-batch."""

    gradients: Tensor | None
    """Of the inputs, if they were asked for."""
    weights: tuple[Tensor, ...]
    """Of the adapter's weights, if they were asked for, in the order of the blocks."""


class BatchRunner:
    """Runs micro-batches of one model, several at a time, and does again what fails.

    A failed stage of a micro-batch is redone from the inputs kept here, by another server: that micro-batch
    and those blocks only, forward and back.
    """

    def __init__(
        self,
        node: Node,
        planner: BatchPlanner,
        model: ModelInfo,
        options: PassOptions | None = None,
        *,
        pass_id: Callable[[], str] = random_session_id,
    ) -> None:
        """``pass_id`` makes up names of kept activations, 32 hex digits that nobody must be able to guess."""
        self.node, self.planner, self.model = node, planner, model
        self.options = options or PassOptions()
        self.codecs = BatchCodecs(self.options.codec)
        self.redone = 0
        """Stages that were done again because a server failed."""
        self._pass_id = pass_id
        self._warned_at = -math.inf
        self._limiter = FairLimiter(lambda: self.in_flight)

    def __repr__(self) -> str:
        return f"<BatchRunner {self.model.name} · {self._limiter!r} · {self.redone} stages redone>"

    @property
    def in_flight(self) -> int:
        """Most micro-batches that are under way at a time, with the servers that there are now."""
        if self.options.in_flight is not None:
            return self.options.in_flight
        return min(max(PER_SERVER * self.planner.servers, LEAST_IN_FLIGHT), MOST_IN_FLIGHT)

    async def forward(
        self, span: Span, batches: Sequence[tuple[MicroBatch, Tensor]], *, needs_backward: bool = False
    ) -> list[ForwardContext]:
        """Each batch with its inputs, raw ``[rows, hidden size]``, through ``span``.

        ``needs_backward`` says that `backward` will follow. Raise `MissingBlocksError` when for `PassOptions.
        patience` seconds nobody takes a batch, `InvalidBatchError` at once for one above every server's
        limit, the server's own `InputError` for one that no server can take, and the last server's error when
        all have failed it.
        """
        work: Work = "both" if needs_backward else "forward"
        return await self._concurrently(
            [self._forward(span, batch, inputs, work) for batch, inputs in batches]
        )

    async def backward(
        self,
        contexts: Sequence[ForwardContext],
        gradients: Sequence[Tensor],
        *,
        inputs: bool = True,
        weights: bool = False,
    ) -> list[InputGradients]:
        """From gradients of the outputs of each batch back to its inputs and the adapter's weights.

        Raises as `forward` does.
        """
        return await self._concurrently(
            [
                self._backward(context, gradient, inputs, weights)
                for context, gradient in zip(contexts, gradients, strict=True)
            ]
        )

    def note_wait(self, batch: MicroBatch, reason: SwarmError, now: float) -> None:
        """A micro-batch waits for a server. The first one of many warns."""
        warn = now >= self._warned_at + WARN_EVERY
        if warn:
            self._warned_at = now
        logger.log(
            logging.WARNING if warn else logging.INFO,
            "a batch of %d tokens waits for up to %.0f s: %s",
            batch.rows,
            self.options.patience,
            reason,
        )

    # --- one micro-batch ---------------------------------------------------------------------------------

    async def _forward(self, span: Span, batch: MicroBatch, inputs: Tensor, work: Work) -> ForwardContext:
        done, outputs = await self._through(span, batch, inputs, work, _ServerSearch(self, batch))
        return ForwardContext(batch, tuple(done), outputs)

    async def _through(
        self,
        span: Span,
        batch: MicroBatch,
        hidden: Tensor,
        work: Work,
        search: _ServerSearch,
        stages: Sequence[Stage] = (),
    ) -> tuple[list[StageContext], Tensor]:
        """The stages that it went through, and what came out; ``stages`` of ``span`` are tried first."""
        keep = work == "both" and self.options.keep
        done: list[StageContext] = []
        while (start := done[-1].stage.span.end if done else span.start) < span.end:
            stages = stages or await search.chain(Span(start, span.end), work)
            for stage in stages:
                name = self._pass_id() if keep else ""
                hidden = await as_computed(hidden, stage.server)
                up, down = search.codecs(stage, "activations", hidden)
                result = await search.attempt(
                    stage,
                    "forward",
                    rpc.forward(
                        self.node,
                        self.model,
                        stage,
                        batch,
                        hidden,
                        keep=name,
                        codec=up,
                        answer_codec=down,
                    ),
                    (up, down),
                )
                if result is None:
                    break
                self.codecs.done(stage.server.peer, "activations", hidden, result, search.now())
                done.append(StageContext(stage, hidden, name if result.kept else "", up))
                hidden = result.outputs
            stages = ()
        return done, hidden

    async def _backward(
        self, context: ForwardContext, gradients: Tensor, inputs: bool, weights: bool
    ) -> InputGradients:
        left = list(context.stages)
        found: list[tuple[Tensor, ...]] = []
        search = _ServerSearch(self, context.batch, tuple(each.stage.server.peer for each in context.stages))
        gradient: Tensor | None = gradients
        while left:
            last = left[-1] = await self._sendable(left[-1])
            assert gradient is not None
            gradient = await as_computed(gradient, last.stage.server)
            up, down = search.codecs(last.stage, "gradients", gradient)
            result = await search.attempt(
                last.stage,
                "backward",
                rpc.backward(
                    self.node,
                    self.model,
                    last.stage,
                    context.batch,
                    last.inputs,
                    gradient,
                    kept_as=last.kept_as,
                    wants_inputs=inputs or len(left) > 1,
                    wants_weights=weights,
                    codec=up,
                    inputs_codec=last.codec,
                    answer_codec=down,
                ),
                (up, down, last.codec),
            )
            if result is None:
                left[-1:] = await self._instead_of(last, context.batch, search)
                continue
            self.codecs.done(last.stage.server.peer, "gradients", gradient, result, search.now())
            left.pop()
            found.insert(0, result.weights)
            gradient = result.gradients
        return InputGradients(
            gradient if inputs else None, tuple(tensor for part in found for tensor in part)
        )

    async def _instead_of(
        self, lost: StageContext, batch: MicroBatch, search: _ServerSearch
    ) -> list[StageContext]:
        """Other stages to go back through; inputs of inner ones are computed again."""
        *inner, final = await search.chain(lost.stage.span, "backward")
        if not inner:
            return [StageContext(final, lost.inputs, "", lost.codec)]
        before = Span(lost.stage.span.start, final.span.start)
        redone, hidden = await self._through(before, batch, lost.inputs, "both", search, inner)
        return [*redone, StageContext(final, hidden, "")]

    async def _sendable(self, last: StageContext) -> StageContext:
        """As it is, or with inputs that its server can read: what they became on the way there, raw."""
        if last.codec == "raw" or self.codecs.knows(last.stage.server.peer, last.codec):
            return last
        encoded = await asyncio.to_thread(last.inputs.encode, last.codec)
        return attrs.evolve(last, inputs=await asyncio.to_thread(encoded.decode), codec="raw")

    # --- several at once ---------------------------------------------------------------------------------

    async def _concurrently(self, works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
        """Run them, `in_flight` of all calls at a time; the first failure ends the others of its call."""
        call = Call()

        async def admitted(work: Coroutine[Any, Any, Result]) -> Result:
            async with self._limiter.slot(call):
                return await work

        tasks = [asyncio.create_task(admitted(work), name="micro-batch") for work in works]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for work in works:
                work.close()  # those that never began
            raise


class _ServerSearch:
    """Finds servers for one micro-batch, for as long as it has patience."""

    def __init__(self, runner: BatchRunner, batch: MicroBatch, peers: tuple[PeerId, ...] = ()) -> None:
        """``peers`` are those of the chain that it goes back through."""
        self._runner, self._batch = runner, batch
        self._failure: SwarmError | None = None
        self._avoid: list[PeerId] = []
        self._give_up = self.now() + runner.options.patience
        self._pauses = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._peers = peers

    def codecs(self, stage: Stage, kind: TensorKind, rows: Tensor) -> tuple[str, str]:
        """In which codecs rows go to a server, and come back."""
        return self._runner.codecs.choose(stage.server.peer, kind, rows, self.now(), self._peers)

    async def chain(self, span: Span, work: Work) -> list[Stage]:
        """Servers for ``span``; wait when there are none, or when those that there are have all failed."""
        runner, adapter = self._runner, self._batch.adapter
        while True:
            try:
                chain = runner.planner.chain(
                    span,
                    tokens=self._batch.rows,
                    adapter=adapter.name if adapter else None,
                    avoid=self._avoid,
                    work=work,
                )
            except MissingBlocksError as exc:
                runner.note_wait(self._batch, exc, self.now())
                await self._pause_before_giving_up(exc)
            else:
                if chain.stages[0].server.peer not in self._avoid:
                    self._peers = chain.peers
                    return list(chain.stages)
                # Nobody is left but those that have failed it: once more, later.
                self._avoid.clear()
                await self._pause_before_giving_up(None)

    async def _pause_before_giving_up(self, reason: SwarmError | None) -> None:
        if (left := self._give_up - self.now()) <= 0:
            if reason is not None:
                raise reason from self._failure
            raise self._failure or InternalError("a batch found no server, for no reason")
        await asyncio.sleep(min(left, self._pauses.next()))

    async def attempt(
        self, stage: Stage, kind: PassKind, work: Coroutine[Any, Any, Done], codecs: Iterable[str]
    ) -> Done | None:
        """Do one pass, in ``codecs``; None when its server failed and another is to be found, or the same one
        is to be asked in others. Raise what no other server could do better.
        """
        runner, peer = self._runner, stage.server.peer
        try:
            result = await work
        except SpanError as exc:  # it has moved, and the view here is older
            self._failure = located(stage, exc)
            self._avoid.append(peer)
            return None
        except UnknownCodecError as exc:
            self._failure = located(stage, exc)
            if not runner.codecs.refused(peer, codecs):
                raise self._failure from exc
            return None
        except InputError as exc:
            raise located(stage, exc) from exc
        except SwarmError as exc:
            self._failure = located(stage, exc)
            if self.now() > self._give_up:
                raise self._failure from exc
            runner.redone += 1
            logger.info("a batch of %d tokens is done again: %s", self._batch.rows, self._failure)
            self._avoid.append(peer)
            if not isinstance(exc, TooManyCallsError):
                runner.planner.failed(peer, exc)
            return None
        runner.planner.worked(stage, kind, self._batch.rows, result.seconds)
        self._give_up = self.now() + runner.options.patience
        self._pauses.reset()
        return result

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()
