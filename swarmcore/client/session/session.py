"""An inference session over the network: steps pipelined through servers, any of which may vanish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from swarmcore.client.session.failover import FailoverHandler
from swarmcore.client.session.moves import SessionMoves
from swarmcore.client.session.opening import ATTEMPTS, ChainOpener
from swarmcore.client.session.options import Failover, SessionOptions
from swarmcore.client.session.pipeline import Pipeline
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.client.session.prefix import SessionPrefix, parted
from swarmcore.client.session.window import StepWindow
from swarmcore.errors import (
    InputError,
    InvalidStepError,
    SessionLostError,
    SwarmError,
)
from swarmcore.routing.chain import Chain, numerics_text
from swarmcore.rpc.node import Node
from swarmcore.session.steps import Reply, SentStep
from swarmcore.types import ModelInfo, Numerics
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.messages import NamePages
from swarmcore.wire.tensors import Tensor

__all__ = ["Failover", "InferenceSession", "SentStep", "SessionOptions", "open_session"]

logger = logging.getLogger(__name__)


class InferenceSession:
    """Runs new tokens of some sequences through all blocks of a model; the servers keep the attention caches.

    Made by `open_session`; close it, or use it as an async context manager, to free the caches. `step` sends
    new tokens and waits for what comes of them; with `send` and `receive` several steps are under way, one
    behind the other, and with `recall` those are given up that turn out to be of no use.

    A server that fails is replaced, its caches are rebuilt from the journal, and the steps go on: they then
    only take longer (see `SessionOptions.journal`).
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.model = pipeline.model
        self.sequences = len(pipeline.steps.positions)
        self.options = pipeline.options
        self._pipeline = pipeline
        self._failover = FailoverHandler(pipeline)
        self._window = StepWindow(
            pipeline, self._failover, through=self._step_through, given_up=self._steps_given_up
        )
        self._moves = SessionMoves(pipeline, self._failover, self._window)
        pipeline.on_draining = self._moves.on_draining
        self._sending = asyncio.Lock()
        self._broken: SwarmError | None = None
        self._steps_done = 0

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
        """Tokens of each sequence in the servers' caches, once the steps under way are through."""
        return self._pipeline.steps.planned

    @property
    def max_in_flight(self) -> int:
        """Steps that may be under way at a time; 1 while a server of the chain cannot be told to drop one."""
        return self._window.max_steps

    @property
    def cached(self) -> tuple[int, ...]:
        """Tokens of each sequence that servers had computed before it began; see `open_session`."""
        return self._pipeline.begun_with

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
        """Send new tokens through the chain and return what comes out of the last block: `send`, `receive`.

        A step whose caller is cancelled is called back.
        """
        sent = await self.send(hidden, lengths, starts=starts, sources=sources, reply=reply)
        try:
            return await self.receive(sent)
        except asyncio.CancelledError:
            if (recall := self._window.forget(sent)) is not None:
                self._pipeline.tasks.start(self._window.tell(recall), "session recall")
            raise

    async def send(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: Reply = "last",
    ) -> SentStep:
        """Send new tokens through the chain, behind the steps that are under way; `receive` gives the result.

        ``hidden`` is ``[sum(lengths), hidden size]``, the sequences' new tokens one after the other, without
        padding; a length of 0 leaves a sequence alone. With ``sources``, for beam search, sequence ``i``
        first becomes a copy of sequence ``sources[i]``; no other step may be under way then. ``starts``
        default to `positions` (reordered); a lower start rolls that sequence back. With ``reply="last"`` the
        result has one row for each sequence of length above 0, with ``"all"`` one for every token.

        Wait while `max_in_flight` steps are under way, or the first one is. Raise `InvalidStepError` for
        shapes and positions that do not fit.
        """
        self._pipeline.node.check_loop()
        expected = (sum(lengths), self.model.hidden_size)
        if hidden.shape != expected:
            raise InvalidStepError(f"hidden states have shape {hidden.shape}, expected {expected}")
        async with self._sending:
            if self._broken is None:
                await self._window.wait_for_room()
            if self._broken is not None:
                raise self._broken
            self._check_first(lengths, sources)
            if self._pipeline.cached:
                hidden, lengths, starts = self._begin(hidden, lengths, starts, reply)
            plan = self._pipeline.steps.begin(
                lengths, starts, reply, chunk_rows=self.options.chunk_rows, sources=sources
            )
            return self._window.add(plan, hidden)

    async def receive(self, step: SentStep) -> Tensor:
        """What comes of a step that was sent, as soon as it and those before it are through.

        Raise `MissingBlocksError` when servers were lost and nobody has held their blocks for ``patience``
        seconds, another `UnavailableError` or `BusyError` when there were replacements and none would do. The
        session then stands where it was before the step, and those sent behind it have failed as well; they
        may be sent again. Without a journal the session has ended. Raise `InvalidStepError` when the step was
        called back.
        """
        output = await step.result()
        self._window.received(step)
        return output

    async def recall(self, step: SentStep) -> None:
        """Give up a step, if it has not been received, and all that were sent behind it.

        The next step starts where the first of them did, or below. Servers are told, past all that is queued,
        and drop what they have not computed. Harmless when repeated.
        """
        if (recall := self._window.forget(step)) is not None:
            await self._window.tell(recall)

    def rollback(self, positions: Sequence[int]) -> None:
        """Forget what is cached beyond ``positions``; the servers do so with the next step.

        Steps under way are not called back. Raise `InvalidStepError` for a position beyond `positions`.
        """
        self._pipeline.steps.rollback(positions)

    async def name_pages(self, tokens: Sequence[Sequence[int]]) -> None:
        """Tell the servers what the sequences consist of by now, so that it is found when they are closed.

        ``tokens`` are those that are cached, of each sequence. Of no effect without the ``prompts`` of
        `open_session`, or when there is no whole page more.
        """
        pipeline, prefix = self._pipeline, self._pipeline.prefix
        if prefix is None or not self._window.sound or self._broken is not None or pipeline.failed:
            return
        if any(len(each) > end for each, end in zip(tokens, self.positions, strict=True)):
            return  # something was called back below
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
        """End the session on every server; steps under way raise. Harmless when repeated."""
        if self._broken is None:
            self._broken = SessionLostError("the session was closed on this side")
        try:
            await self._moves.tasks.close()
            await self._window.close(self._broken)
        finally:
            await self._pipeline.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # --- steps -------------------------------------------------------------------------------------------

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
            pipeline.begin_with_nothing()
            return hidden, lengths, starts
        skipped = tuple(map(prefix.skipped, range(self.sequences), pipeline.cached, lengths))
        if not any(skipped):
            return hidden, lengths, starts
        left_out, rest = parted(hidden, lengths, skipped)
        pipeline.begin_with(skipped, left_out)
        return rest, tuple(map(int.__sub__, lengths, skipped)), skipped

    def _step_through(self) -> None:
        """A step has come back."""
        self._pipeline.cached = ()
        if self._steps_done == 0:
            self._remember()
        self._steps_done += 1
        if asyncio.get_running_loop().time() >= self._moves.next_check:
            self._moves.look_for_better(self._steps_done)

    def _steps_given_up(self, error: SwarmError) -> None:
        """What is under way has failed."""
        if self.options.journal == "off" and self._pipeline.failed:
            self._broken = error


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
