"""The live chain of a session: streams to every stage, steps under way, what comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from swarmcore.client.session.opening import OpenStage
from swarmcore.client.session.options import SessionOptions
from swarmcore.errors import (
    DeadlineExceededError,
    ProtocolError,
    RemoteFaultError,
    SessionLostError,
    SwarmError,
)
from swarmcore.routing.chain import Chain
from swarmcore.rpc.asking import ask
from swarmcore.rpc.node import Node
from swarmcore.rpc.response_times import ResponseTime
from swarmcore.session.journal import Journal
from swarmcore.session.patience import StepPatience
from swarmcore.session.steps import Chunk, SessionSteps
from swarmcore.types import Address, ModelInfo, PeerId
from swarmcore.wire.failure import to_error
from swarmcore.wire.framing import Message
from swarmcore.wire.messages import (
    AskSession,
    Draining,
    KvTransferFailed,
    SessionState,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
)
from swarmcore.wire.protocols import SESSION_STATE_METHOD
from swarmcore.wire.tensors import FLOATS, Tensor

logger = logging.getLogger(__name__)

SHORTEST_SILENCE = 0.25
LONGEST_SILENCE = 1.0
"""Seconds without any word from a stage after which all of them are asked how far they are; between these
bounds it is what is usual between two words, and then twice as long each time."""

LEAST_UNDER_LOAD = 1.0
"""Seconds that a stage has to answer that while prompts or replays fill the way to it."""


@attrs.define(eq=False)
class LiveStage:
    """A stage of the chain as it is now, and its stream."""

    opened: OpenStage
    listener: asyncio.Task[None] | None = None
    failure: SwarmError | None = None
    """Why the stage has to be replaced."""
    proven: bool = False
    """Whether it has done a step."""
    leaving: bool = False
    """Whether the session is trying to move off it."""
    hand_over: asyncio.Future[None] | None = None
    """Set to the error when it cannot hand its caches over."""
    sending: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    """Steps come from the session, and from the stage before when they are carried."""
    clock: asyncio.TimerHandle | None = None
    """Runs while something is being sent."""
    asking: asyncio.Task[None] | None = None
    """Asks it how far it is."""
    state: SessionState | None = None
    """What it answered last; None when it never has, as servers of older versions."""
    silent_since: float | None = None
    """When it was first asked without an answer."""

    @property
    def peer(self) -> PeerId:
        return self.opened.hop.peer

    @property
    def holds(self) -> bool:
        """Whether it says that it has a step of the session, and is there."""
        return self.silent_since is None and self.state is not None and self.state.holds

    @property
    def start(self) -> int:
        return self.opened.hop.start

    @property
    def end(self) -> int:
        return self.opened.hop.end

    def __str__(self) -> str:
        return str(self.opened.stage)


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
    done: bool = False
    output: Tensor | None = None
    error: SwarmError | None = None
    """Why a stage refused it, or failed on it."""
    refused_by: LiveStage | None = None


class Pipeline:
    """Sends chunks along the stages and takes in what they answer.

    A stage that fails in any way is marked with its ``failure`` and otherwise left to the caller, as is a
    pending that fails; `wait` waits for that. Its owner is one task at a time.
    """

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        opened: Sequence[OpenStage],
        *,
        sequences: int,
        options: SessionOptions,
    ) -> None:
        self.node = node
        self.model = model
        self.options = options
        self.steps = SessionSteps(
            [stage.hop for stage in opened],
            sequences=sequences,
            carried=[i for i, stage in enumerate(opened) if not stage.next_hop_reachable],
        )
        self.journal = Journal(sequences, [])
        self.stages = [self._listening(stage) for stage in opened]
        self.chunks: dict[int, PendingChunk] = {}
        self._progress = 0
        self._gaps = ResponseTime()
        self._latest_word = asyncio.get_running_loop().time()
        self._rows_sent = 0
        self.patience = StepPatience(self._latest_word, options.step_timeout)
        """Told of all progress; whoever waits for a pending asks it what to do."""
        self._awaited: tuple[Callable[[], bool], asyncio.Future[None]] | None = None
        self.on_blame: Callable[[PeerId, SwarmError], None] = lambda peer, error: None
        self.on_draining: Callable[[LiveStage, float], None] = lambda stage, seconds: None
        self.alone: Callable[[LiveStage], bool] = lambda stage: False
        """Whether nobody else has the blocks of a stage."""
        self._closing: set[asyncio.Task[None]] = set()
        self._keep_inputs()
        for stage in self.stages:
            self._acquaint(stage)

    @property
    def chain(self) -> Chain:
        return Chain(tuple(stage.opened.stage for stage in self.stages))

    @property
    def failed(self) -> tuple[int, int] | None:
        """The first and the last of the foremost stages in a row that have to be replaced."""
        first = next((i for i, stage in enumerate(self.stages) if stage.failure), None)
        if first is None:
            return None
        last = first
        while last + 1 < len(self.stages) and self.stages[last + 1].failure:
            last += 1
        return first, last

    def fail(self, stage: LiveStage, error: SwarmError, *, blame: bool = True) -> None:
        """The stage is of no more use to this session; with ``blame`` its server is to be avoided."""
        if stage.failure is not None or stage not in self.stages:
            return
        stage.failure = error
        stage.opened.channel.abort("the session goes on without this server")
        _end_hand_over(stage, error)
        if blame:
            logger.info("%s failed its session: %s", stage, error)
            self.on_blame(stage.peer, error)
        self._progressed()

    def replace(self, first: int, last: int, opened: Sequence[OpenStage]) -> list[LiveStage]:
        """Put new stages in the place of ``first`` to ``last``; return them."""
        before = self.stages[first : last + 1]
        stages = [self._listening(stage) for stage in opened]
        self.stages[first : last + 1] = stages
        carried = [i for i, stage in enumerate(opened) if not stage.next_hop_reachable]
        self.steps.replace(first, last, [stage.hop for stage in opened], carried=carried)
        self._keep_inputs()
        for pending in self.chunks.values():
            pending.attempt += 1
        for stage in before:
            self._dismiss(stage)
        for stage in stages:
            self._acquaint(stage)
        return stages

    # --- sending -----------------------------------------------------------------------------------------

    def begin(self, chunk: Chunk, hidden: Tensor | None = None) -> PendingChunk:
        """Expect what comes of ``chunk``, whose rows, encoded, are ``hidden``; `send` sends it."""
        pending = PendingChunk(chunk, self.stages[0].start, self.stages[0].start)
        self.chunks[chunk.step] = pending
        if not chunk.replay:
            self.journal.begin(chunk.step, chunk.rows)
            if hidden is not None:
                self.journal.receive(self.stages[0].start, chunk.step, hidden)
        return pending

    async def send(self, index: int, pending: PendingChunk, hidden: Tensor) -> None:
        """Send a step to one stage. A failure is that stage's, and is not raised."""
        stage, options = self.stages[index], self.options
        self._rows_sent += pending.chunk.rows
        step: Step = self.steps.step_for(
            index,
            pending.chunk,
            codec=options.codec,
            deadline=options.step_timeout,
            journal=options.journal,
            attempt=pending.attempt,
        )
        await self.tell(stage, step, hidden)

    def stuck_at(self, pending: PendingChunk) -> LiveStage:
        """The stage behind which the pending is not known to have come."""
        return next(stage for stage in self.stages if stage.end > pending.reached)

    def blame_stuck(self, pending: PendingChunk, error: SwarmError) -> None:
        """The stage where the pending got no further has failed."""
        stage = self.stuck_at(pending)
        index = self.stages.index(stage)
        self.fail(stage, error)
        if stage.start > pending.sent and not stage.proven:
            # Nothing has ever come through to this one: it may be the one before that lets nothing pass.
            self.fail(self.stages[index - 1], error)

    async def tell(self, stage: LiveStage, record: Any, *tensors: Tensor) -> None:
        """Send anything to a stage. A failure is that stage's, and is not raised."""
        loop = asyncio.get_running_loop()
        async with stage.sending:
            patience = StepPatience(loop.time(), self.options.step_timeout)
            stage.clock = loop.call_later(LONGEST_SILENCE, self._sends_slowly, stage, patience)
            try:
                await stage.opened.channel.send(record, *tensors)
            except SwarmError as exc:
                # Whatever the stream ended with says more than that nothing can be sent on it.
                await asyncio.sleep(0)
                self.fail(stage, exc)
            finally:
                stage.clock.cancel()

    def _sends_slowly(self, stage: LiveStage, patience: StepPatience) -> None:
        loop = asyncio.get_running_loop()
        stage.clock = loop.call_later(LONGEST_SILENCE, self._sends_slowly, stage, patience)
        self._ask_all()
        if self._latest_word > loop.time() - LONGEST_SILENCE:
            patience.progressed(loop.time())
        # Where nobody else has its blocks, that the way to it is slow is a reason to wait while it answers.
        answers = stage.state is not None and stage.silent_since is None
        if patience.look(loop.time(), held=answers, alone=answers and self.alone(stage)) in _LOST:
            self.fail(stage, DeadlineExceededError("it does not take in a step"))

    def forget(self, pending: PendingChunk) -> None:
        """Nothing is expected of the pending any more."""
        self.chunks.pop(pending.chunk.step, None)
        self.journal.forget(pending.chunk.step)

    # --- waiting -----------------------------------------------------------------------------------------

    async def wait(self, done: Callable[[], bool], *, timeout: float) -> bool:
        """Wait until ``done``; False when there was no progress, of whatever kind, for ``timeout`` seconds.

        When there is none, stages are asked how far they are: what they compute meanwhile is progress, too.
        Those that do not answer have failed, unless nobody else has their blocks.
        """
        loop = asyncio.get_running_loop()
        seen, latest = self._progress, loop.time()
        silence = first = min(max(self._gaps.timeout, SHORTEST_SILENCE), LONGEST_SILENCE)
        while not done():
            waiter: asyncio.Future[None] = loop.create_future()
            self._awaited = done, waiter
            clock = loop.call_later(min(silence, timeout), _wake, waiter)
            try:
                await waiter
            finally:
                self._awaited = None
                clock.cancel()
            if self._progress != seen:
                seen, latest, silence = self._progress, loop.time(), first
            elif loop.time() - latest >= timeout:
                return done()
            else:
                self._ask_all()
                silence = min(2 * silence, LONGEST_SILENCE)
        return True

    def look(self) -> None:
        """Something has happened: see whether it is what `wait` waits for."""
        if self._awaited is not None and self._awaited[0]():
            _wake(self._awaited[1])

    def _progressed(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._awaited is not None:  # else it is the caller's thinking that took the time
            self._gaps.measured(now - self._latest_word)
        self._latest_word = now
        self.patience.progressed(now)
        self._progress += 1
        self.look()

    # --- asking ------------------------------------------------------------------------------------------

    def _ask_all(self) -> None:
        for stage in self.stages:
            if not stage.failure and (stage.asking is None or stage.asking.done()):
                stage.asking = asyncio.create_task(self._ask(stage), name="session probe")

    def _acquaint(self, stage: LiveStage) -> None:
        """Learn how fast a new stage answers while it is well, so that it can be judged when it is not."""
        if not self.node.response_times.of(stage.peer).known:
            stage.asking = asyncio.create_task(self._ask(stage), name="session probe")

    async def _ask(self, stage: LiveStage) -> None:
        hop, began = stage.opened.hop, asyncio.get_running_loop().time()
        addresses = [Address.parse(url) for url in hop.addresses]
        hasty = self.options.journal != "off" and not self._under_load()
        least = 0.0 if hasty else LEAST_UNDER_LOAD
        try:
            state = await ask(
                self.node, addresses, SESSION_STATE_METHOD, AskSession(hop.session), least=least
            )
        except DeadlineExceededError as exc:
            if exc.origin is None:
                self._silent(stage, began, exc)
        except SwarmError as exc:
            # Its stream still stands: whether a second connection can be made is another matter.
            logger.debug("%s could not be asked how far it is: %s", stage, exc)
            if exc.origin is not None:
                stage.silent_since = None
        else:
            stage.silent_since = None
            self._told(stage, state)

    def _silent(self, stage: LiveStage, since: float, error: SwarmError) -> None:
        """It is replaced by whoever else has its blocks; if nobody has, it may come back."""
        stage.silent_since = since if stage.silent_since is None else stage.silent_since
        silence = asyncio.get_running_loop().time() - stage.silent_since
        if silence >= self.options.patience or not self.alone(stage):
            self.fail(stage, error)

    def _told(self, stage: LiveStage, state: SessionState) -> None:
        """Take note of how far a stage is; what it has not been sent it cannot have computed."""
        before, stage.state = stage.state, state
        if not state.known:
            self.fail(stage, SessionLostError("it no longer has the session"), blame=False)
        elif before is None:
            return
        elif before.rows < state.rows <= self._rows_sent:
            self._progressed()
        elif before.work < state.work and state.holds and not state.waits_for_room:
            self.patience.others_progressed(asyncio.get_running_loop().time())

    def _under_load(self) -> bool:
        """Whether more is under way than single tokens, so that answers may be held up by it."""
        most = len(self.steps.positions)
        return any(pending.chunk.rows > most for pending in self.chunks.values()) or any(
            stage.sending.locked() for stage in self.stages
        )

    # --- receiving ---------------------------------------------------------------------------------------

    def _listening(self, opened: OpenStage) -> LiveStage:
        stage = LiveStage(opened)
        stage.listener = asyncio.create_task(self._listen(stage), name="session listener")
        return stage

    async def _listen(self, stage: LiveStage) -> None:
        """Take what one server sends: outputs, copies, refusals, or the end of its stream."""
        try:
            while True:
                await self._heard(stage, await stage.opened.channel.receive())
        except SwarmError as exc:
            self.fail(stage, exc)
        except Exception as exc:
            logger.exception("session over %s broke", stage)
            self.fail(stage, RemoteFaultError(f"what it sent could not be dealt with: {exc}"))

    async def _heard(self, stage: LiveStage, message: Message) -> None:
        record = message.record
        if stage not in self.stages:
            return
        match record:
            case StepOutput() | StepForwarded():
                await self._step_passed(stage, record, message)
            case StepFailed():
                pending = self.chunks.get(record.step)
                if pending is not None and pending.attempt == record.attempt:
                    pending.error, pending.refused_by = to_error(record.failure, stage.peer), stage
                    self._progressed()
            case Draining():
                self.on_draining(stage, record.seconds)
            case KvTransferFailed():
                _end_hand_over(stage, to_error(record.failure, stage.peer))
            case _:
                raise ProtocolError(f"unexpected {message.kind} in the middle of a session")

    async def _step_passed(
        self, stage: LiveStage, record: StepOutput | StepForwarded, message: Message
    ) -> None:
        """A step has come past ``stage``."""
        index = self.stages.index(stage)
        pending = self.chunks.get(record.step)
        current = pending is not None and pending.attempt == record.attempt
        carry_to = self.steps.received(index, record, current=current)
        hidden = self._hidden(message)
        if hidden is not None and self.journal.receive(stage.end, record.step, hidden):
            self._progressed()
        if pending is None or pending.done or not current:
            return
        chunk, home = pending.chunk, stage.end == (pending.chunk.until or self.model.blocks)
        if home and isinstance(record, StepForwarded):
            raise ProtocolError("a step was forwarded from where it ends")
        if stage.end > pending.reached:
            pending.reached = stage.end
            self._progressed()
        if isinstance(record, StepForwarded):
            return
        expected = chunk.answer_rows if home else chunk.rows
        if (hidden.shape[0] if hidden else 0) != expected:
            raise ProtocolError(f"a step was answered with {hidden and hidden.shape[0]} rows of {expected}")
        if home:
            pending.output, pending.done = hidden and hidden.decode(), True
            self._progressed()
        elif carry_to is not None and hidden is not None and not self.stages[carry_to].failure:
            await self.send(carry_to, pending, hidden)

    def _hidden(self, message: Message) -> Tensor | None:
        """The hidden states of an answer, checked as far as that goes without decoding them."""
        if not message.tensors:
            return None
        hidden = message.tensor("hidden")
        shaped = len(hidden.shape) == 2 and hidden.shape[1] == self.model.hidden_size
        if not shaped or hidden.dtype not in FLOATS or hidden.codec != self.options.codec:
            raise ProtocolError(f"unexpected hidden states: {hidden}")
        return hidden

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

    # --- the end -----------------------------------------------------------------------------------------

    def _dismiss(self, stage: LiveStage) -> None:
        """Let go of a stage that is no longer of the chain."""
        for each in (stage.listener, stage.asking):
            if each is not None:
                each.cancel()
        task = asyncio.create_task(stage.opened.channel.close(), name="session stage closing")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End the session on every server."""
        listeners = [stage.listener for stage in self.stages if stage.listener is not None]
        for stage in self.stages:
            self._dismiss(stage)
        await asyncio.gather(*listeners, *self._closing, return_exceptions=True)


_LOST = frozenset({"replace", "give up"})


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _end_hand_over(stage: LiveStage, error: SwarmError) -> None:
    if stage.hand_over is not None and not stage.hand_over.done():
        stage.hand_over.set_exception(error)
        stage.hand_over.exception()  # seen, also when nobody waits any more
