"""The steps of a session that are under way, one behind the other, and the one loop that drives them all."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from swarmcore.client.session.failover import FailoverHandler
from swarmcore.client.session.opening import located
from swarmcore.client.session.pipeline import PendingChunk, Pipeline
from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InputError,
    InvalidStepError,
    RemoteFaultError,
    ServerMemoryError,
    SessionLostError,
    SwarmError,
    TooManyCallsError,
    UnknownCodecError,
)
from swarmcore.session.patience import ALONE
from swarmcore.session.steps import Chunk, SentStep, StepPlan
from swarmcore.tasks import cancel_and_wait
from swarmcore.wire.limits import MAX_STEPS_IN_FLIGHT
from swarmcore.wire.messages import Recall
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)


class StepWindow:
    """Sends the chunks of steps, a few at a time, and takes their outputs; replaces stages that fail.

    Whatever is under way stands and falls together: it is sent again after a failover, and given up from the
    first step on that servers refuse. ``through`` is called when a step has come back, ``given_up`` with the
    error when those that are under way are.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        failover: FailoverHandler,
        *,
        through: Callable[[], None],
        given_up: Callable[[SwarmError], None],
    ) -> None:
        self.begun = False
        """Whether a step has come back: until one has, there is one at a time."""
        self._pipeline = pipeline
        self._failover = failover
        self._through = through
        self._given_up = given_up
        self._under_way: deque[SentStep] = deque()
        self._waiting: deque[tuple[SentStep, Chunk]] = deque()
        """Chunks of steps under way that were not sent yet."""
        self._kept: dict[SentStep, None] = {}
        """Those that nobody has received, through or not."""
        self._in_flight: deque[PendingChunk] = deque()
        self._resent = False
        """Whether what is in flight was sent again. It goes another way than what follows it: the one has to
        be through before the other is sent."""
        self._sound = False
        self._driver: asyncio.Task[None] | None = None
        self._driving = asyncio.Lock()
        self._moves_waiting = 0
        self._room = asyncio.Event()

    def __len__(self) -> int:
        """Steps under way."""
        return len(self._under_way)

    @property
    def max_steps(self) -> int:
        """Steps that may be under way at a time: as many as every server of the chain takes in."""
        taken_in = (stage.opened.max_in_flight for stage in self._pipeline.stages)
        return max(1, min(MAX_STEPS_IN_FLIGHT, *taken_in))

    @property
    def sound(self) -> bool:
        """Whether the caches hold what the latest step has left, up to where the next one may start."""
        return self._sound and not self._under_way

    async def wait_for_room(self) -> None:
        """Until one more step may be added."""
        while len(self) >= (self.max_steps if self.begun else 1):
            self._room.clear()
            await self._room.wait()

    def add(self, plan: StepPlan, hidden: Tensor) -> SentStep:
        """Send a step, as soon as there is room for its chunks in flight."""
        step = SentStep(plan, hidden)
        self._under_way.append(step)
        self._waiting.extend((step, chunk) for chunk in plan.chunks)
        self._kept[step] = None
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive(), name="session steps")
        else:
            self._pipeline.check_awaited()
        return step

    def received(self, step: SentStep) -> None:
        """Somebody has what came of a step: it is not to be given up any more."""
        self._kept.pop(step, None)

    def forget(self, step: SentStep) -> Recall | None:
        """Give up a step, unless it was received, and all behind it; return what servers are to be told."""
        first = step.plan.first
        return self._forget(
            [each for each in self._kept if each.plan.first >= first],
            InvalidStepError("the step was called back"),
        )

    async def tell(self, recall: Recall) -> None:
        """Have the servers drop what they have not computed of these steps."""
        pipeline = self._pipeline
        for stage in list(pipeline.stages):
            if stage.opened.max_in_flight and stage.failure is None:
                if stage.sending.locked():  # by a step, perhaps a long one on a slow link
                    pipeline.tasks.start(pipeline.send_to(stage, recall), "session recall")
                else:
                    await pipeline.send_to(stage, recall)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """While nothing is in flight: what is waits until the end of the context, or is through before."""
        self._moves_waiting += 1
        try:
            await self._driving.acquire()
        finally:
            self._moves_waiting -= 1
            self._pipeline.check_awaited()
        try:
            yield
        finally:
            self._driving.release()

    async def close(self, error: SwarmError) -> None:
        """Whatever is under way fails with ``error``."""
        for step in self._kept:
            step.end(error)
        self._under_way.clear()
        self._room.set()
        await cancel_and_wait(self._driver)

    # --- driving -----------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        while self._under_way:
            async with self._driving:
                self._pipeline.patience.progressed(asyncio.get_running_loop().time())
                self._failover.retries.succeeded()
                while self._under_way and (self._in_flight or not self._moves_waiting):
                    try:
                        await self._advance()
                    except SwarmError as exc:
                        await self._give_up(exc)
                    except Exception as exc:
                        logger.exception("the steps of a session failed unexpectedly")
                        await self._give_up(RemoteFaultError(f"a step failed unexpectedly: {exc!r}"))

    async def _advance(self) -> None:
        pipeline, failover, in_flight = self._pipeline, self._failover, self._in_flight

        def news() -> bool:
            """Take what has come back; whether there is anything else to do."""
            self._settle()
            return (
                not in_flight
                or in_flight[0].error is not None
                or pipeline.failed is not None
                or self._may_send
            )

        self._settle()
        self._resent = self._resent and bool(in_flight)
        again = False
        if not self._under_way:
            return
        if pipeline.failed:
            await failover.replace_failed()
            again = True
        elif in_flight and in_flight[0].error is not None:
            again = await self._refused(in_flight[0])
        elif self._may_send:
            step, chunk = self._waiting.popleft()
            in_flight.append(pending := pipeline.begin(chunk))
            rows = step.hidden.rows(chunk.first_row, chunk.first_row + chunk.rows)
            await pipeline.send_new(pending, rows)
        elif not await pipeline.wait(news, timeout=pipeline.patience.judge_after) and in_flight:
            again = self._stuck(in_flight[0])
        if again:
            self._resent = bool(in_flight)
            await failover.resend(tuple(in_flight))

    @property
    def _may_send(self) -> bool:
        """Whether there is one more chunk that may be in flight."""
        held_up = self._resent or self._moves_waiting or len(self._in_flight) >= MAX_STEPS_IN_FLIGHT
        return bool(self._waiting) and not held_up

    def _settle(self) -> None:
        """Chunks that are through are part of the session from now on. Never while a failover replays it."""
        while self._in_flight and self._in_flight[0].done:
            pending, step = self._in_flight.popleft(), self._under_way[0]
            step.outputs.append(self._pipeline.settle(pending))
            self._failover.retries.succeeded()
            if pending.chunk is step.plan.chunks[-1]:
                self._under_way.popleft()
                self._room.set()
                self.begun = self._sound = True
                step.end()
                self._through()

    # --- steps that end otherwise ------------------------------------------------------------------------

    async def _give_up(self, error: SwarmError) -> None:
        if not self._under_way:
            return  # all was called back meanwhile; the next step finds what there is
        self._given_up(error)
        self._sound = False
        first, *others = self._under_way
        first.end(error)
        why = type(error)(f"a step before this one failed: {error.message}", **error.details)
        if (recall := self._forget([first, *others], why)) is not None:
            await self.tell(recall)

    def _forget(self, steps: Sequence[SentStep], error: SwarmError) -> Recall | None:
        """Give up these steps, the latest there are."""
        if not steps:
            return None
        pipeline, first = self._pipeline, steps[0].plan.first
        lost = [pending for pending in self._in_flight if pending.chunk.step >= first]
        for pending in lost:
            self._in_flight.remove(pending)
            pipeline.forget(pending)
        self._waiting = deque((step, chunk) for step, chunk in self._waiting if chunk.step < first)
        plans = [step.plan for step in steps]
        if any(map(pipeline.steps.reordering, plans)):
            self._sound = False
            for stage in pipeline.stages:
                why = SessionLostError("it may have reordered its caches for a step that was given up")
                pipeline.fail(stage, why, blame=False)
        recall = pipeline.steps.abandon(plans)
        if not self.begun:  # what it began with is for its caller to send again
            pipeline.begin_with_nothing()
        for step in steps:
            step.end(error)
            self._kept.pop(step, None)
            if step in self._under_way:
                self._under_way.remove(step)
        self._room.set()
        pipeline.check_awaited()
        return None if all(pending.done for pending in lost) else recall

    def _stuck(self, pending: PendingChunk) -> bool:
        """Deal with a chunk that gets no further; whether all in flight is to be sent again.

        Raise `DeadlineExceededError` when nobody but the server that holds it has the blocks.
        """
        pipeline, now = self._pipeline, asyncio.get_running_loop().time()
        stage = pipeline.stuck_at(pending)
        verdict = pipeline.patience.judge(now, held=stage.holds_step, alone=pipeline.alone(stage))
        seconds = pipeline.options.step_timeout * (ALONE if verdict == "give up" else 1)
        error = DeadlineExceededError(f"a step got no further in {seconds:.0f} s")
        if verdict == "give up":
            raise located(stage, error, "it answers, and nobody else has its blocks")
        if verdict == "replace":
            pipeline.blame_stuck(pending, error)
        return verdict == "resend" and pipeline.options.journal != "off"

    async def _refused(self, pending: PendingChunk) -> bool:
        """A server refused a step, or failed on it: raise what only the caller can deal with.

        True when all in flight is to be sent again: the server had no memory or time for it, its caches are
        as they were, and nobody else has its blocks or has memory for it either.
        """
        pipeline, failover = self._pipeline, self._failover
        error, stage = pending.error, pending.refused_by
        assert error is not None and stage is not None
        pending.error = None
        if isinstance(error, InvalidStepError) and pipeline.cached and any(pipeline.begun_with):
            # It may have lost what it said it had. Once all is computed again this says if it was that.
            pipeline.cached, pipeline.begun_with = (), (0,) * len(pipeline.begun_with)
            pipeline.fail(stage, SessionLostError(f"it has lost its prefix: {error.message}"), blame=False)
            return False
        unknown_codec = isinstance(error, UnknownCodecError) and pipeline.options.journal != "off"
        if unknown_codec and pipeline.use_raw_at(stage):
            return True
        if isinstance(error, InputError | CacheFullError | TooManyCallsError):
            raise located(stage, error)
        if pipeline.options.journal != "off" and isinstance(error, ServerMemoryError | DeadlineExceededError):
            # Where one server was short of memory, another one would hardly do better at once.
            if pipeline.alone(stage) or failover.retries.busy:
                await failover.pause_after(error, stage)
                return stage in pipeline.stages and stage.failure is None
            failover.retries.failed(asyncio.get_running_loop().time(), error)
        pipeline.fail(stage, error)
        return False
