"""The steps of a session on their way through its live chain: what was sent, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import attrs

from swarmcore.client.session.live_chain import LiveChain, LiveStage
from swarmcore.client.session.opening import OpenStage
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.client.session.prefix import SessionPrefix
from swarmcore.errors import ProtocolError, SwarmError
from swarmcore.routing.chain import Chain
from swarmcore.routing.step_codec import STEP_CODECS, StepCodecs
from swarmcore.rpc.node import Node
from swarmcore.session.journal import Journal
from swarmcore.session.steps import Chunk, SessionSteps
from swarmcore.types import ModelInfo, PeerId
from swarmcore.wire.failure import to_error
from swarmcore.wire.framing import Message
from swarmcore.wire.limits import MAX_DRAFTED
from swarmcore.wire.messages import (
    Draining,
    KvTransferFailed,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
)
from swarmcore.wire.tensors import FLOATS, Tensor


@attrs.define(eq=False)
class PendingChunk:
    """A chunk under way."""

    chunk: Chunk
    reached: int
    """The block up to which it is known to have come."""
    sent: int = 0
    """The block of the stage to which it was sent; those that follow get it from one another."""
    attempt: int = 0
    """Counted up when it has to be sent again: answers to what was sent before count no longer."""
    codecs: dict[int, str] = attrs.Factory(dict)
    """In which its rows go to each block, where that was chosen: the same whenever it is sent again."""
    done: bool = False
    output: Tensor | None = None
    error: SwarmError | None = None
    """Why a stage refused it, or failed on it."""
    refused_by: LiveStage | None = None


class Pipeline(LiveChain):
    """Sends chunks along the stages and takes in what they answer.

    A chunk that fails is marked with its ``error``, as a stage is with its ``failure``, and otherwise left to
    the owner.
    """

    def __init__(
        self,
        node: Node,
        planner: SessionPlanner,
        model: ModelInfo,
        opened: Sequence[OpenStage],
        *,
        sequences: int,
        options: SessionOptions,
        prefix: SessionPrefix | None = None,
    ) -> None:
        self.model = model
        self.prefix = prefix
        """What the sequences consist of, where the session's caller says it."""
        self.steps = SessionSteps(
            [stage.hop for stage in opened],
            sequences=sequences,
            carried=[i for i, stage in enumerate(opened) if not stage.next_hop_reachable],
        )
        self.journal = Journal(sequences, [])
        self.pending: dict[int, PendingChunk] = {}
        self.on_draining: Callable[[LiveStage, float], None] = lambda stage, seconds: None
        """Called when a server says that it leaves, with the seconds that it stays."""
        super().__init__(node, planner, opened, options)
        self.numerics = list(self.chain.numerics)
        """How servers of the session have computed so far, each way once."""
        self._link_codecs = planner.codecs if options.codec == "auto" else None
        self.codec = "raw" if self._link_codecs is not None else options.codec
        """Of rows for which none is chosen by link: of all, unless it is ``"auto"``, and of replays."""
        self._keep_inputs()
        self.cached = tuple(map(min, zip(*(stage.cached for stage in opened), strict=False)))
        """Tokens of each sequence that all stages have before the first step; empty for none, or after it."""
        self.begun_with = (0,) * sequences
        """Tokens of each sequence that were computed before, of those that the first step brought."""
        if self.prefix is not None:
            self.prefix.opened_on(self.chain)

    def begin_with(self, lengths: Sequence[int], rows: Tensor) -> None:
        """The sequences begin with so many ``rows`` that all stages have computed before."""
        self.journal.begin_with(self.stages[0].start, lengths, rows.encode(self.codec))
        self.steps.begin_at(lengths)
        self.begun_with = tuple(lengths)
        for stage in self.stages:
            stage.lacks_outputs = True

    def begin_with_nothing(self) -> None:
        """All rows of the first step are to be computed."""
        self.cached, self.begun_with = (), (0,) * len(self.begun_with)
        self.steps.begin_at(self.begun_with)

    def replace(self, first: int, last: int, opened: Sequence[OpenStage]) -> list[LiveStage]:
        """Put new stages in the place of ``first`` to ``last``; return them."""
        before = self.stages[first : last + 1]
        stages = [self._listening(stage, self.steps.next_step) for stage in opened]
        self.stages[first : last + 1] = stages
        self.numerics += [way for way in self.chain.numerics if way not in self.numerics]
        if self.prefix is not None:
            self.prefix.replaced_by(Chain(tuple(stage.stage for stage in opened)))
        carried = [i for i, stage in enumerate(opened) if not stage.next_hop_reachable]
        self.steps.replace(first, last, [stage.hop for stage in opened], carried=carried)
        self._keep_inputs()
        for pending in self.pending.values():
            pending.attempt += 1
        for stage in before:
            self._dismiss(stage)
        return stages

    def _keep_inputs(self) -> None:
        """Keep the inputs of the stages that there are."""
        starts = {
            "client": {stage.start for stage in self.stages},
            "servers": {self.stages[0].start},
            "off": set[int](),
        }[self.options.journal]
        self.journal.keep_only(starts)
        for start in starts - self.journal.blocks:
            self.journal.rebuild(start, (0,) * len(self.steps.positions))

    # --- there -------------------------------------------------------------------------------------------

    def begin(self, chunk: Chunk) -> PendingChunk:
        """Expect what comes of ``chunk``; `send_new` or `send` sends it."""
        start = self.stages[0].start
        pending = self.pending[chunk.step] = PendingChunk(chunk, start, start)
        if not chunk.replay:
            self.journal.begin(chunk.step, chunk.rows)
        return pending

    async def send_new(self, pending: PendingChunk, rows: Tensor) -> None:
        """Send the raw ``rows`` of a chunk to the first stage, and keep them for failovers."""
        codec, first = self.codec, self.stages[0]
        if self._link_codecs is not None:
            link, now = (None, first.peer), asyncio.get_running_loop().time()
            codec = self._link_codecs.codec(link, rows.dtype, rows.shape, now)
        hidden = rows.encode(codec)
        self.journal.receive(first.start, pending.chunk.step, hidden)
        await self.send(0, pending, hidden)

    async def send(self, index: int, pending: PendingChunk, hidden: Tensor) -> None:
        """Send a chunk to one stage. A failure is that stage's, and is not raised."""
        self._rows_sent += pending.chunk.rows
        step = self.steps.step_for(
            index,
            pending.chunk,
            codec=self.codec,
            deadline=self.options.step_timeout,
            journal=self.options.journal,
            attempt=pending.attempt,
        )
        if self._link_codecs is not None and not pending.chunk.replay:
            if not self._link_codecs.takes_int8(self.stages[index].peer):
                hidden = hidden.decode()
            step = self._with_codecs(self._link_codecs, index, pending, step)
        await self.send_to(self.stages[index], step, hidden)

    def _with_codecs(self, links: StepCodecs, index: int, pending: PendingChunk, step: Step) -> Step:
        """``step``, which goes to stage ``index`` now, with the codec of each link behind it."""
        now, end = asyncio.get_running_loop().time(), index + len(step.chain)

        def codec(stage: LiveStage, receiver: PeerId | None, rows: int) -> str:
            if stage.end not in pending.codecs:
                shape = (rows, self.model.hidden_size)
                dtype = stage.opened.stage.server.dtype
                pending.codecs[stage.end] = links.codec((stage.peer, receiver), dtype, shape, now)
            return pending.codecs[stage.end]

        chain = (
            attrs.evolve(hop, codec=codec(stage, hop.peer, pending.chunk.rows))
            for stage, hop in zip(self.stages[index:end], step.chain, strict=True)
        )
        final = end == len(self.stages) - 1
        rows = pending.chunk.answer_rows if final else pending.chunk.rows
        return attrs.evolve(step, chain=tuple(chain), codec=codec(self.stages[end], None, rows), sent=now)

    def use_raw_at(self, stage: LiveStage) -> bool:
        """A server does not know a codec: it gets raw rows from now on. False when it was not sent others."""
        if self._link_codecs is None or not self._link_codecs.takes_int8(stage.peer):
            return False
        self._link_codecs.refuse_int8(stage.peer)
        for pending in self.pending.values():
            pending.codecs.clear()
        return True

    # --- and back ----------------------------------------------------------------------------------------

    async def _received(self, stage: LiveStage, message: Message) -> None:
        record = message.record
        match record:
            case StepOutput() | StepForwarded():
                await self._step_passed(stage, record, message)
            case StepFailed():
                pending = self.pending.get(record.step)
                if pending is not None and pending.attempt == record.attempt:
                    pending.error, pending.refused_by = to_error(record.failure, stage.peer), stage
                    self._progressed()
            case Draining():
                self.on_draining(stage, record.seconds)
            case KvTransferFailed():
                self._kv_transfer_failed(stage, to_error(record.failure, stage.peer))
            case _:
                raise ProtocolError(f"unexpected {message.kind} in the middle of a session")

    async def _step_passed(
        self, stage: LiveStage, record: StepOutput | StepForwarded, message: Message
    ) -> None:
        """A step has come past ``stage``: to its end, to the next stage, or back to be carried there."""
        index = self.stages.index(stage)
        pending = self.pending.get(record.step)
        current = pending is not None and pending.attempt == record.attempt
        carry_to = self.steps.received(index, record, current=current)
        hidden = self._hidden(message)
        if hidden is not None and self.journal.receive(stage.end, record.step, hidden):
            self._progressed()
        if pending is None or pending.done or not current:
            return
        if self._link_codecs is not None:
            self._measure(self._link_codecs, index, pending, record, hidden)
        chunk, final = pending.chunk, stage.end == (pending.chunk.until or self.model.blocks)
        if final and isinstance(record, StepForwarded):
            raise ProtocolError("a step was forwarded from where it ends")
        if stage.end > pending.reached:
            pending.reached = stage.end
            self._progressed()
        if isinstance(record, StepForwarded):
            return
        expected = chunk.answer_rows if final else chunk.rows
        if (hidden.shape[0] if hidden else 0) != expected:
            raise ProtocolError(f"a step was answered with {hidden and hidden.shape[0]} rows of {expected}")
        if final:
            pending.output, pending.done = hidden and hidden.decode(), True
            self._progressed()
        elif carry_to is not None and hidden is not None and not self.stages[carry_to].failure:
            await self.send(carry_to, pending, hidden)

    def _measure(
        self,
        links: StepCodecs,
        index: int,
        pending: PendingChunk,
        record: StepOutput | StepForwarded,
        hidden: Tensor | None,
    ) -> None:
        """Take note of how long rows were under way: to stage ``index``, and from there to here."""
        stage, now = self.stages[index], asyncio.get_running_loop().time()
        if (arrival := record.arrival) is not None:
            sender = self.stages[index - 1].peer if stage.start != pending.sent else None
            links.arrived((sender, stage.peer), arrival.nbytes, arrival.transit, now)
        if isinstance(record, StepOutput) and record.sent is not None and hidden is not None:
            links.arrived((stage.peer, None), hidden.data.nbytes, now - record.sent, now)

    def _hidden(self, message: Message) -> Tensor | None:
        """The hidden states of an answer, checked as far as that goes without decoding them."""
        if not message.tensors:
            return None
        hidden = message.tensor("hidden")
        shaped = len(hidden.shape) == 2 and hidden.shape[1] == self.model.hidden_size
        codecs = STEP_CODECS if self._link_codecs is not None else (self.codec,)
        if not shaped or hidden.dtype not in FLOATS or hidden.codec not in codecs:
            raise ProtocolError(f"unexpected hidden states: {hidden}")
        return hidden

    # --- chunks that end ---------------------------------------------------------------------------------

    def settle(self, pending: PendingChunk) -> Tensor:
        """The chunk is through: from now on it is part of what is replayed. Return its output."""
        self.steps.settle(pending.chunk)
        self.journal.settle(pending.chunk)
        del self.pending[pending.chunk.step]
        for stage in self.stages:
            if not stage.proven:
                stage.proven = True
                self.planner.worked(stage.peer)
        assert pending.output is not None
        return pending.output

    def forget(self, pending: PendingChunk) -> None:
        """Nothing is expected of the chunk any more."""
        self.pending.pop(pending.chunk.step, None)
        self.journal.forget(pending.chunk.step)

    def stuck_at(self, pending: PendingChunk) -> LiveStage:
        """The stage where the chunk is: the first one of which no output is known."""
        return next(stage for stage in self.stages if stage.end > pending.reached)

    def blame_stuck(self, pending: PendingChunk, error: SwarmError) -> None:
        """Mark the stage where the chunk got no further as failed, and perhaps the one before it."""
        stage = self.stuck_at(pending)
        index = self.stages.index(stage)
        self.fail(stage, error)
        if stage.start > pending.sent and not stage.proven:
            # Nothing has ever come through to this one: it may be the one before that lets nothing pass.
            self.fail(self.stages[index - 1], error)

    def _under_load(self) -> bool:
        most = MAX_DRAFTED * len(self.steps.positions)
        return any(pending.chunk.rows > most for pending in self.pending.values()) or any(
            stage.sending.locked() for stage in self.stages
        )
