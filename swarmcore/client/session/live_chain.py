"""The chain of a session as it is now: a stream to each stage, whether each lives, waiting for progress."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from swarmcore.client.session.opening import OpenStage
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.errors import DeadlineExceededError, RemoteFaultError, SessionLostError, SwarmError
from swarmcore.routing.chain import Chain
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import probe
from swarmcore.rpc.response_times import ResponseTime
from swarmcore.session.patience import StepPatience
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import Address, PeerId, Span
from swarmcore.wire.framing import Message
from swarmcore.wire.messages import AskSession, SessionState
from swarmcore.wire.protocols import SESSION_STATE_METHOD
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

SHORTEST_SILENCE = 0.25
LONGEST_SILENCE = 1.0
"""Seconds without any message from a stage after which all of them are asked how far they are; between these
bounds it is what is usual between two messages, and then twice as long each time."""

LEAST_UNDER_LOAD = 1.0
"""Seconds that a stage has to answer that while prompts or replays fill the link to it."""


@attrs.define(eq=False)
class LiveStage:
    """A stage of the chain as it is now, and its stream."""

    opened: OpenStage
    first_step: int = 0
    """Steps from this number on were begun when it was part of the chain."""
    listener: asyncio.Task[None] | None = None
    failure: SwarmError | None = None
    """Why the stage has to be replaced."""
    proven: bool = False
    """Whether it has done a step."""
    lacks_outputs: bool = False
    """Whether the session began with rows that it had computed before, and sent nowhere this time."""
    leaving: bool = False
    """Whether the session is trying to move off it."""
    kv_transfer: asyncio.Future[None] | None = None
    """Set to the error when it cannot send its caches to another server."""
    sending: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    """Steps come from the session, and from the stage before when they are carried."""
    send_timer: asyncio.TimerHandle | None = None
    """Runs while something is being sent."""
    probe: asyncio.Task[None] | None = None
    """Asks it how far it is."""
    state: SessionState | None = None
    """What it answered last; None when it never has, as servers of older versions."""
    silent_since: float | None = None
    """When it was first asked without an answer."""

    @property
    def peer(self) -> PeerId:
        return self.opened.hop.peer

    @property
    def start(self) -> int:
        return self.opened.hop.start

    @property
    def end(self) -> int:
        return self.opened.hop.end

    @property
    def answers(self) -> bool:
        """Whether it has answered the latest question how far it is."""
        return self.silent_since is None and self.state is not None

    @property
    def holds_step(self) -> bool:
        """Whether it says that it has a step of the session, and is there."""
        return self.answers and self.state is not None and self.state.holds

    def __str__(self) -> str:
        return str(self.opened.stage)


def chain_of(stages: Iterable[LiveStage]) -> Chain:
    return Chain(tuple(stage.opened.stage for stage in stages))


class LiveChain(ABC):
    """The stages of a session. One that fails in any way is marked with its ``failure``, and left to the
    owner, who may `wait` for that among other things. The owner is one task at a time.
    """

    def __init__(
        self, node: Node, planner: SessionPlanner, opened: Sequence[OpenStage], options: SessionOptions
    ) -> None:
        self.node = node
        self.planner = planner
        self.options = options
        self._progress = 0
        self._gaps = ResponseTime()
        self._latest_message = asyncio.get_running_loop().time()
        self._rows_sent = 0
        self.patience = StepPatience(self._latest_message, options.step_timeout)
        """Told of all progress; whoever waits for a chunk asks it what to do."""
        self._awaited: tuple[Callable[[], bool], asyncio.Future[None]] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.tasks = BackgroundTasks()
        """What is sent without anybody waiting for it."""
        self.stages = [self._listening(stage) for stage in opened]

    @property
    def chain(self) -> Chain:
        return chain_of(self.stages)

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

    def alone(self, stage: LiveStage) -> bool:
        """Whether nobody else has the blocks of a stage."""
        return self.planner.alone(stage.peer, Span(stage.start, stage.end))

    def fail(self, stage: LiveStage, error: SwarmError, *, blame: bool = True) -> None:
        """The stage is of no more use to this session; with ``blame`` its server is to be avoided."""
        if stage.failure is not None or stage not in self.stages:
            return
        stage.failure = error
        stage.opened.channel.abort("the session goes on without this server")
        self._kv_transfer_failed(stage, error)
        if blame:
            logger.info("%s failed its session: %s", stage, error)
            self.planner.failed(stage.peer, error)
        self._progressed()

    def _kv_transfer_failed(self, stage: LiveStage, error: SwarmError) -> None:
        if stage.kv_transfer is not None and not stage.kv_transfer.done():
            stage.kv_transfer.set_exception(error)
            stage.kv_transfer.exception()  # seen, also when nobody waits any more

    # --- streams -----------------------------------------------------------------------------------------

    async def send_to(self, stage: LiveStage, record: Any, *tensors: Tensor) -> None:
        """Send anything to a stage. A failure is that stage's, and is not raised."""
        loop = asyncio.get_running_loop()
        async with stage.sending:
            patience = StepPatience(loop.time(), self.options.step_timeout)
            stage.send_timer = loop.call_later(LONGEST_SILENCE, self._sending_is_slow, stage, patience)
            try:
                await stage.opened.channel.send(record, *tensors)
            except SwarmError as exc:
                # Whatever the stream ended with says more than that nothing can be sent on it.
                await asyncio.sleep(0)
                self.fail(stage, exc)
            finally:
                stage.send_timer.cancel()

    def _sending_is_slow(self, stage: LiveStage, patience: StepPatience) -> None:
        loop = asyncio.get_running_loop()
        stage.send_timer = loop.call_later(LONGEST_SILENCE, self._sending_is_slow, stage, patience)
        self._probe_all()
        if self._latest_message > loop.time() - LONGEST_SILENCE:
            patience.progressed(loop.time())
        # Where nobody else has its blocks, that the link to it is slow is a reason to wait while it answers.
        alone = stage.answers and self.alone(stage)
        if patience.judge(loop.time(), held=stage.answers, alone=alone) in ("replace", "give up"):
            self.fail(stage, DeadlineExceededError("it does not take in a step"))

    def _listening(self, opened: OpenStage, first_step: int = 0) -> LiveStage:
        stage = LiveStage(opened, first_step)
        stage.listener = asyncio.create_task(self._listen(stage), name="session listener")
        # How fast it answers while it is well is what it is judged by when it is not.
        if not self.node.response_times.of(stage.peer).known:
            stage.probe = asyncio.create_task(self._probe(stage), name="session probe")
        return stage

    async def _listen(self, stage: LiveStage) -> None:
        """Take what one server sends: outputs, copies, refusals, or the end of its stream."""
        try:
            while True:
                message = await stage.opened.channel.receive()
                if stage in self.stages:
                    await self._received(stage, message)
        except SwarmError as exc:
            self.fail(stage, exc)
        except Exception as exc:
            logger.exception("session over %s broke", stage)
            self.fail(stage, RemoteFaultError(f"what it sent could not be dealt with: {exc}"))

    @abstractmethod
    async def _received(self, stage: LiveStage, message: Message) -> None:
        """Take in a message of one stage."""

    def _dismiss(self, stage: LiveStage) -> None:
        """Let go of a stage that is no longer of the chain."""
        for task in (stage.listener, stage.probe):
            if task is not None:
                task.cancel()
        closing = asyncio.create_task(stage.opened.channel.close(), name="session stage closing")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End the session on every server."""
        await self.tasks.close()
        listeners = [stage.listener for stage in self.stages if stage.listener is not None]
        for stage in self.stages:
            self._dismiss(stage)
        await asyncio.gather(*listeners, *self._closing, return_exceptions=True)

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
                self._probe_all()
                silence = min(2 * silence, LONGEST_SILENCE)
        return True

    def check_awaited(self) -> None:
        """Something has happened: see whether it is what `wait` waits for."""
        if self._awaited is not None and self._awaited[0]():
            _wake(self._awaited[1])

    def _progressed(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._awaited is not None:  # else it is the caller's thinking that took the time
            self._gaps.measured(now - self._latest_message)
        self._latest_message = now
        self.patience.progressed(now)
        self._progress += 1
        self.check_awaited()

    # --- asking stages how far they are ------------------------------------------------------------------

    @abstractmethod
    def _under_load(self) -> bool:
        """Whether more is under way than a few tokens, so that answers may be held up by it."""

    def _probe_all(self) -> None:
        for stage in self.stages:
            if not stage.failure and (stage.probe is None or stage.probe.done()):
                stage.probe = asyncio.create_task(self._probe(stage), name="session probe")

    async def _probe(self, stage: LiveStage) -> None:
        hop, began = stage.opened.hop, asyncio.get_running_loop().time()
        hasty = self.options.journal != "off" and not self._under_load()
        least = 0.0 if hasty else LEAST_UNDER_LOAD
        question, addresses = AskSession(hop.session), Address.parse_all(hop.addresses)
        try:
            state = await probe(self.node, addresses, SESSION_STATE_METHOD, question, least=least)
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
            self._answered(stage, state)

    def _silent(self, stage: LiveStage, since: float, error: SwarmError) -> None:
        """It has failed, unless nobody else has its blocks: then it has `patience` seconds to come back."""
        stage.silent_since = since if stage.silent_since is None else stage.silent_since
        silence = asyncio.get_running_loop().time() - stage.silent_since
        if silence >= self.options.patience or not self.alone(stage):
            self.fail(stage, error)

    def _answered(self, stage: LiveStage, state: SessionState) -> None:
        """Take note of how far a stage is. It can be no further than what was sent to it."""
        before, stage.state = stage.state, state
        if not state.known:
            self.fail(stage, SessionLostError("it no longer has the session"), blame=False)
        elif before is None:
            return
        elif before.rows < state.rows <= self._rows_sent:
            self._progressed()
        elif before.work < state.work and state.holds and not state.waits_for_room:
            self.patience.others_progressed(asyncio.get_running_loop().time())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
