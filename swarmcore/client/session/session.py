"""An inference session over the network: steps pipelined through servers, any of which may vanish."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from swarmcore.client.session.failover import FailoverHandler
from swarmcore.client.session.moves import SessionMoves
from swarmcore.client.session.opening import ATTEMPTS, ChainOpener, located
from swarmcore.client.session.options import Failover, SessionOptions
from swarmcore.client.session.pipeline import PendingChunk, Pipeline
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.client.session.prefix import SessionPrefix, parted
from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InputError,
    InvalidStepError,
    ServerMemoryError,
    SessionLostError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.routing.chain import Chain, numerics_text
from swarmcore.rpc.node import Node
from swarmcore.session.patience import ALONE
from swarmcore.session.steps import Reply, StepPlan
from swarmcore.types import ModelInfo, Numerics
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.messages import NamePages
from swarmcore.wire.tensors import Tensor

__all__ = ["Failover", "InferenceSession", "SessionOptions", "open_session"]

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 8
"""Prefill chunks of one session under way in the chain."""


class InferenceSession:
    """Runs new tokens of some sequences through all blocks of a model; the servers keep the attention caches.

    Made by `open_session`; close it, or use it as an async context manager, to free the caches. One step at a
    time: `step` must have returned before it is called again.

    A server that fails is replaced, its caches are rebuilt from the journal, and the step goes on: it then
    only takes longer (see `SessionOptions.journal`).
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.model = pipeline.model
        self.sequences = len(pipeline.steps.positions)
        self.options = pipeline.options
        self._pipeline = pipeline
        self._step_lock = asyncio.Lock()
        self._failover = FailoverHandler(pipeline)
        self._moves = SessionMoves(pipeline, self._failover, self._step_lock)
        pipeline.on_draining = self._moves.on_draining
        self._step: asyncio.Timeout | None = None
        self._broken: SwarmError | None = None
        self._steps_done = 0
        self._cached = (0,) * self.sequences
        self._settled = False
        """Whether the caches hold what the latest step has left, as opposed to a part of one that failed."""

    @property
    def chain(self) -> Chain:
        """The servers that the session passes through now."""
        return self._pipeline.chain

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How its servers have computed so far, each way once. With more than one, what was generated may
        differ from what servers of either make alone, from a near tie on."""
        return tuple(way for way in self._pipeline.numerics if way is not None)

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens of each sequence in the servers' caches."""
        return self._pipeline.steps.positions

    @property
    def cached(self) -> tuple[int, ...]:
        """Tokens of each sequence that servers had computed before it began; see `open_session`."""
        return self._cached

    @property
    def failovers(self) -> int:
        """How often stages have been replaced so far."""
        return self._failover.failovers

    def __repr__(self) -> str:
        state = "closed" if self._broken else f"pos {','.join(map(str, self.positions))}"
        count = self.failovers
        failovers = f" · {count} failover{'s' * (count > 1)}" if count else ""
        return f"<InferenceSession {self.model.name} {self.chain} · {state}{failovers}>"

    async def step(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: Reply = "last",
    ) -> Tensor:
        """Send new tokens through the chain and return what comes out of the last block.

        ``hidden`` is ``[sum(lengths), hidden size]``, the sequences' new tokens one after the other, without
        padding; a length of 0 leaves a sequence alone. With ``sources``, for beam search, sequence ``i``
        first becomes a copy of sequence ``sources[i]``. ``starts`` default to `positions` (reordered); a
        lower start rolls that sequence back. With ``reply="last"`` the result has one row for each sequence
        of length above 0, with ``"all"`` one for every token.

        Raise `InvalidStepError` for shapes and positions that do not fit; `MissingBlocksError` when servers
        were lost and nobody has held their blocks for ``patience`` seconds, another `UnavailableError` or
        `BusyError` when there were replacements and none would do. The session then stands where it was, and
        the step may be tried again; without a journal the session has ended.
        """
        self._pipeline.node.check_loop()
        if self._broken is not None:
            raise self._broken
        if self._step is not None:
            raise InvalidStepError("a step of this session is still under way; await it first")
        expected = (sum(lengths), self.model.hidden_size)
        if hidden.shape != expected:
            raise InvalidStepError(f"hidden states have shape {hidden.shape}, expected {expected}")
        self._check_first(lengths, sources)
        self._step = until_closed = asyncio.timeout(None)
        self._settled = False
        try:
            async with until_closed, self._step_lock:
                if self._pipeline.cached:
                    hidden, lengths, starts = self._begin(hidden, lengths, starts, reply)
                plan = self._pipeline.steps.begin(
                    lengths, starts, reply, chunk_rows=self.options.chunk_rows, sources=sources
                )
                output = await self._run(plan, hidden)
        except TimeoutError as exc:
            if not until_closed.expired() or self._broken is None:
                raise
            raise self._broken from exc
        finally:
            self._step = None
        self._pipeline.cached, self._settled = (), True
        if self._steps_done == 0:
            self._remember()
        self._steps_done += 1
        if asyncio.get_running_loop().time() >= self._moves.next_check:
            self._moves.look_for_better(self._steps_done)
        return output

    def rollback(self, positions: Sequence[int]) -> None:
        """Forget what is cached beyond ``positions``; the servers do so with the next step.

        Raise `InvalidStepError` for a position that is not cached.
        """
        self._pipeline.steps.rollback(positions)

    async def name_pages(self, tokens: Sequence[Sequence[int]]) -> None:
        """Tell the servers what the sequences consist of by now, so that it is found when they are closed.

        ``tokens`` are those that are cached, of each sequence. Of no effect without the ``prompts`` of
        `open_session`, or when there is no whole page more.
        """
        pipeline, prefix = self._pipeline, self._pipeline.prefix
        if prefix is None or not self._settled or self._broken is not None or pipeline.failed:
            return
        if not prefix.grown(tokens):
            return
        if names := prefix.names():
            for stage in list(pipeline.stages):
                if stage.opened.cached and stage.failure is None:
                    await pipeline.send_to(stage, NamePages(names))
            self._remember()

    def _remember(self) -> None:
        """Prefer this chain for sessions that begin with the same."""
        pipeline = self._pipeline
        if pipeline.prefix is not None and all(stage.opened.cached for stage in pipeline.stages):
            pipeline.planner.prefixes.remember(pipeline.prefix.names_on(""), self.chain)

    async def close(self) -> None:
        """End the session on every server; a step under way raises. Harmless when repeated."""
        if self._broken is None:
            self._broken = SessionLostError("the session was closed on this side")
        if self._step is not None and not self._step.expired():
            self._step.reschedule(0)
        try:
            await self._moves.tasks.close()
            async with self._step_lock:
                pass  # the step has let go of what it was opening
        finally:
            await self._pipeline.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _begin_with_nothing(self) -> None:
        self._pipeline.cached, self._cached = (), (0,) * self.sequences

    # --- one step ----------------------------------------------------------------------------------------

    def _check_first(self, lengths: Sequence[int], sources: Sequence[int]) -> None:
        """Raise `InvalidStepError` for a first step that cannot be the prompts which have names."""
        prefix = self._pipeline.prefix
        if self._steps_done or prefix is None or not any(prefix.tokens):
            return
        prompts = list(map(len, prefix.tokens))
        if sources or list(lengths) != prompts:
            raise InvalidStepError(
                f"the first step brings {list(lengths)} rows{' and reorders' * bool(sources)}; the session "
                f"was opened for prompts of {prompts} tokens"
            )

    def _begin(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        starts: Sequence[int] | None,
        reply: Reply,
    ) -> tuple[Tensor, Sequence[int], Sequence[int] | None]:
        """Leave out of the first step what all servers have: it is only put down for failovers.

        Not the last row of a sequence, of which the result is made.
        """
        pipeline, prefix = self._pipeline, self._pipeline.prefix
        if prefix is None or reply != "last" or any(starts or ()) or not any(prefix.tokens):
            self._begin_with_nothing()
            return hidden, lengths, starts
        skipped = tuple(map(prefix.skipped, range(self.sequences), pipeline.cached, lengths))
        if not any(skipped):
            return hidden, lengths, starts
        left_out, rest = parted(hidden, lengths, skipped)
        pipeline.begin_with(skipped, left_out)
        self._cached = skipped
        return rest, tuple(map(int.__sub__, lengths, skipped)), skipped

    async def _run(self, plan: StepPlan, hidden: Tensor) -> Tensor:
        pipeline = self._pipeline
        self._failover.retries.succeeded()
        in_flight: deque[PendingChunk] = deque()
        try:
            outputs = await self._run_chunks(plan, hidden, in_flight)
        except BaseException as exc:
            for pending in in_flight:
                pipeline.forget(pending)
            if pipeline.steps.reordering(plan):
                for stage in pipeline.stages:
                    error = SessionLostError("it may have reordered its caches for a step that was given up")
                    pipeline.fail(stage, error, blame=False)
            pipeline.steps.abandon(plan)
            if self._steps_done == 0:  # what it began with is for its caller to send again
                self._begin_with_nothing()
                pipeline.steps.rollback((0,) * self.sequences)
            if self.options.journal == "off" and pipeline.failed and isinstance(exc, SwarmError):
                self._broken = exc
            raise
        return plan.joined(outputs)

    async def _run_chunks(
        self, plan: StepPlan, hidden: Tensor, in_flight: deque[PendingChunk]
    ) -> list[Tensor]:
        """Send the chunks, a few at a time, and take their outputs; replace stages that fail meanwhile."""
        pipeline, failover = self._pipeline, self._failover
        waiting, outputs = deque(plan.chunks), list[Tensor]()
        pipeline.patience.progressed(asyncio.get_running_loop().time())
        resent = False

        def news() -> bool:
            return in_flight[0].done or in_flight[0].error is not None or pipeline.failed is not None

        while True:
            while in_flight and in_flight[0].done:
                outputs.append(pipeline.settle(in_flight.popleft()))
                failover.retries.succeeded()
            if not waiting and not in_flight:
                return outputs
            resent = resent and bool(in_flight)
            again = False
            if pipeline.failed:
                await failover.replace_failed()
                again = True
            elif in_flight and in_flight[0].error is not None:
                again = await self._refused(in_flight[0])
            elif waiting and len(in_flight) < CHUNKS_IN_FLIGHT and not resent:
                # What is sent again goes another way than what follows it: the one has to be through first.
                chunk = waiting.popleft()
                rows = chunk.rows_of(hidden).encode(self.options.codec)
                in_flight.append(pipeline.begin(chunk, rows))
                await pipeline.send(0, in_flight[-1], rows)
            elif not await pipeline.wait(news, timeout=pipeline.patience.judge_after):
                again = self._stuck(in_flight[0])
            if again:
                await failover.resend(in_flight)
                resent = bool(in_flight)

    def _stuck(self, pending: PendingChunk) -> bool:
        """Deal with a chunk that gets no further; whether it is to be sent again.

        Raise `DeadlineExceededError` when nobody but the server that holds it has the blocks.
        """
        pipeline, now = self._pipeline, asyncio.get_running_loop().time()
        stage = pipeline.stuck_at(pending)
        verdict = pipeline.patience.judge(now, held=stage.holds_step, alone=pipeline.alone(stage))
        seconds = self.options.step_timeout * (ALONE if verdict == "give up" else 1)
        error = DeadlineExceededError(f"a step got no further in {seconds:.0f} s")
        if verdict == "give up":
            raise located(stage, error, "it answers, and nobody else has its blocks")
        if verdict == "replace":
            pipeline.blame_stuck(pending, error)
        return verdict == "resend" and self.options.journal != "off"

    async def _refused(self, pending: PendingChunk) -> bool:
        """A server refused a step, or failed on it: raise what only the caller can deal with.

        True when the step is to be sent again: the server had no memory or time for it, its caches are as
        they were, and nobody else has its blocks or has memory for it either.
        """
        pipeline, failover = self._pipeline, self._failover
        error, stage = pending.error, pending.refused_by
        assert error is not None and stage is not None
        pending.error = None
        if isinstance(error, InvalidStepError) and pipeline.cached and any(self._cached):
            # It may have lost what it said it had. Once all is computed again this says if it was that.
            self._begin_with_nothing()
            pipeline.fail(stage, SessionLostError(f"it has lost its prefix: {error.message}"), blame=False)
            return False
        if isinstance(error, InputError | CacheFullError | TooManyCallsError):
            raise located(stage, error)
        if self.options.journal != "off" and isinstance(error, ServerMemoryError | DeadlineExceededError):
            # Where one server was short of memory, another one would hardly do better at once.
            if pipeline.alone(stage) or failover.retries.busy:
                await failover.pause_after(error, stage)
                return stage in pipeline.stages and stage.failure is None
            failover.retries.failed(asyncio.get_running_loop().time(), error)
        pipeline.fail(stage, error)
        return False


async def open_session(
    node: Node,
    planner: SessionPlanner,
    model: ModelInfo,
    *,
    sequences: int,
    tokens: int = 0,
    options: SessionOptions | None = None,
    attempts: int = ATTEMPTS,
    prompts: Sequence[Sequence[int]] = (),
    namespace: str = "",
) -> InferenceSession:
    """Open a session through all blocks of ``model``, on every server of a chain at once.

    Servers with ``tokens`` of cache free, over all sequences, are preferred. A server that refuses or does
    not answer is avoided in the next of ``attempts``, see `ChainOpener`. Raise `MissingBlocksError` when no
    chain is left, `CacheFullError` or the last server's error when the attempts are used up.

    ``prompts`` are the tokens of each sequence, whose rows the first step has to bring, these and no others:
    what all servers have kept of them from earlier sessions of this client and ``namespace`` is not computed
    again.
    """
    options = options or SessionOptions()
    prefix = None
    if prompts and options.prefix_cache:
        if len(prompts) != sequences:
            raise InputError(f"{len(prompts)} prompts for {sequences} sequences; expected one for each")
        adapter = planner.adapter.name if planner.adapter is not None else AdapterName()
        values = model.fingerprint, adapter.name, adapter.version, options.codec, namespace
        prefix = SessionPrefix(prompts, *values)
    opener = ChainOpener(
        node=node,
        planner=planner,
        model=model,
        sequences=sequences,
        timeout=options.open_timeout,
        prefix=prefix,
    )
    opened = await opener.open_best(model.span, tokens=tokens, attempts=attempts)
    pipeline = Pipeline(node, planner, model, opened, sequences=sequences, options=options, prefix=prefix)
    if len(pipeline.numerics) > 1:
        logger.info("a session's servers compute in several ways: %s", numerics_text(pipeline.numerics))
    if prefix is not None and not any(pipeline.cached):
        planner.prefixes.forget(prefix.names_on(""))
    return InferenceSession(pipeline)
