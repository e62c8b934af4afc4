"""Failover: replacing the stages of a session that are lost, and giving the new ones their caches.

Section 3.2 and Algorithm 1 of the paper, with the replay in one go, and for missing blocks only.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Sequence

from swarmcore.client.session.opening import (
    OpenStage,
    Planner,
    Refusals,
    alone,
    located,
    open_chain,
    open_stages,
)
from swarmcore.client.session.options import Failover
from swarmcore.client.session.pipeline import LiveStage, PendingChunk, Pipeline
from swarmcore.client.session.replay import REPLAY_ROWS, replay
from swarmcore.errors import (
    DeadlineExceededError,
    ServerMemoryError,
    SessionLostError,
    SwarmError,
)
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.moving import differences
from swarmcore.session.patience import MAX_FAILURES, RetryPolicy
from swarmcore.types import PeerId, Span
from swarmcore.wire.failure import to_error
from swarmcore.wire.messages import AllowUpstream, Hop, KvTransferFailed, KvTransferred, TransferKv

logger = logging.getLogger(__name__)

LATE_COPY = 5.0
"""Seconds without any copy after which a server that still owes some is given up, although it lives, if
somebody else has its blocks."""

SHORTEST_REPLAY = 16
"""Rows of a replay in one piece, at least, however little memory a server has."""

HAND_OVER_TIMEOUT = 60.0
"""Seconds without progress after which a server that leaves cannot hand its caches over; its session waits
meanwhile."""


class FailoverHandler:
    """Keeps a pipeline whole. Used by one task at a time."""

    def __init__(self, pipeline: Pipeline, planner: Planner) -> None:
        self.failovers = 0
        self._pipeline = pipeline
        self._planner = planner
        self._fresh: set[LiveStage] = set()
        self._retries = RetryPolicy(pipeline.options.patience)
        self._replay_rows = REPLAY_ROWS
        pipeline.on_blame = planner.failed
        pipeline.alone = self.alone

    def begin_step(self) -> None:
        """Every stage has all that is settled; what is sent from now on passes through all of them."""
        self._fresh.clear()
        self._retries.succeeded()

    def landed(self) -> None:
        """A step came home."""
        self._retries.succeeded()

    def alone(self, stage: LiveStage) -> bool:
        """Whether nobody else has the blocks of a stage."""
        return alone(self._planner, stage.peer, Span(stage.start, stage.end))

    @property
    def short_of_memory(self) -> bool:
        """Whether a server was, for the step under way: another one would hardly do better at once."""
        return self._retries.busy

    def note(self, error: SwarmError) -> None:
        """A server had no memory or time for a step; another one is to try."""
        self._retries.failed(asyncio.get_running_loop().time(), error)

    async def pause_after(self, error: SwarmError, where: LiveStage) -> None:
        """Leave a server alone for a while that has no room, memory or time for a step; raise ``error`` when
        it has been so for `SessionOptions.patience` seconds."""
        pause = self._retries.failed(asyncio.get_running_loop().time(), error)
        if pause == math.inf:
            raise self._gave_up(located(where, error))
        logger.info("%s: %s; again in %.1f s", where, error, pause)
        await asyncio.sleep(pause)

    async def mend(self) -> None:
        """Replace stages until none is failed.

        Raise `MissingBlocksError` when nobody has held the blocks for `SessionOptions.patience` seconds, and
        the last server's error when servers were there but none would do.
        """
        loop = asyncio.get_running_loop()
        pipeline = self._pipeline
        while (found := pipeline.failed) is not None:
            lost = pipeline.stages[found[0] : found[1] + 1]
            reason = lost[0].failure
            assert reason is not None
            if pipeline.options.journal == "off":
                raise located(lost[0], reason)
            try:
                if await self._rebuild(*found, reason):
                    self._retries.replaced()
                    continue
                failed = next((each for each in pipeline.stages if each.failure), None)
                error = failed.failure if failed is not None else None
            except SwarmError as exc:
                error = exc
            if error is None:
                continue
            if isinstance(error, ServerMemoryError):
                self._replay_rows = max(self._replay_rows // 4, SHORTEST_REPLAY)
            pause = self._retries.failed(loop.time(), error)
            if pause == math.inf:
                raise self._gave_up(error, reason) from error
            logger.info("no replacement for %s yet: %s", _names(lost), error)
            await asyncio.sleep(pause)

    async def resend(self, chunks: Collection[PendingChunk]) -> None:
        """Send steps under way again, from the last place that is known to have them, under their numbers.

        New stages get all of them; others answer those that they know already from memory.
        """
        pipeline = self._pipeline
        index = next((i for i, s in enumerate(pipeline.stages) if s in self._fresh), len(pipeline.stages) - 1)
        while index and not all(
            pipeline.journal.has(pipeline.stages[index].start, pending.chunk.step) for pending in chunks
        ):
            index -= 1
        for pending in chunks:
            # Also one that had come home: until a new stage has it, nothing may follow it there.
            pending.done, pending.output, pending.error = False, None, None
            pending.attempt += 1
            pending.reached = pending.sent = pipeline.stages[index].start
            rows = pipeline.journal.in_flight(pipeline.stages[index].start, pending.chunk.step)
            await pipeline.send(index, pending, rows)

    async def hand_over(self, stage: LiveStage, seconds: float) -> bool:
        """Move the caches of a server that leaves to one other server; False when that cannot be done.

        Nothing is lost then: the stage works as before. Raise `MissingBlocksError` when nobody else has its
        blocks, and the last server's error when nobody takes the session.
        """
        pipeline, loop = self._pipeline, asyncio.get_running_loop()
        index, began = pipeline.stages.index(stage), loop.time()
        opened = await self._open(index, index, blocked=(stage.peer,), heir_of=stage.peer)
        try:
            async with asyncio.timeout(seconds):
                try:
                    if len(opened) > 1 or not await self._caches_taken(stage, opened[0]):
                        raise SessionLostError("the caches are not those of the session")
                except BaseException:
                    for each in opened:
                        each.channel.abort("the session was not moved here")
                    raise
        except (SwarmError, TimeoutError) as exc:
            logger.info("%s could not hand its caches over: %s", stage, exc)
            return False
        stages = pipeline.replace(index, index, opened)
        await self._introduce(stages[-1])
        self._tell([stage], _shutting_down(), stages, "handed over", loop.time() - began)
        return True

    async def leave(self, stage: LiveStage) -> None:
        """Replay elsewhere what a server that leaves has; as `move` otherwise."""
        index = self._pipeline.stages.index(stage)
        await self._rebuild(index, index, _shutting_down(), blocked=(stage.peer,))
        await self.mend()

    async def move(self, better: Chain, why: str) -> None:
        """Turn the chain into ``better``, one different part after the other; each is opened before the old
        one is left. Raise what a new server refuses with; the session is whole all the same.
        """
        for first, last, chain in differences(self._pipeline.chain, better):
            if not _same_blocks(self._pipeline.chain.stages[first : last + 1], chain.stages):
                return  # a failure has changed the chain meanwhile
            await self._rebuild(first, last, SessionLostError(why), chain)
            await self.mend()

    # --- one replacement ---------------------------------------------------------------------------------

    async def _rebuild(
        self,
        first: int,
        last: int,
        reason: SwarmError,
        chain: Chain | None = None,
        *,
        blocked: Collection[PeerId] = (),
    ) -> bool:
        """Replace some stages in a row, by those of ``chain`` or the best there are but for ``blocked``.

        False when more stages have failed meanwhile.
        """
        pipeline, loop = self._pipeline, asyncio.get_running_loop()
        lost, began = pipeline.stages[first : last + 1], loop.time()
        if not await self._inputs_are_known(first):
            return False
        if chain is None:
            opened = await self._open(first, last, blocked=blocked)
        else:
            opened = await self._open_given(first, last, chain)
        stages = pipeline.replace(first, last, opened)
        self._fresh.update(stages)
        replayed = False
        try:
            await self._introduce(stages[-1])
            replayed = await replay(pipeline, first, stages, rows=self._replay_rows)
        finally:
            if not replayed:
                for stage in stages:
                    error = SessionLostError("the session's caches could not be rebuilt there")
                    pipeline.fail(stage, error, blame=False)
        if replayed:
            self._tell(lost, reason, stages, "replayed", loop.time() - began)
        return replayed

    async def _inputs_are_known(self, first: int) -> bool:
        """Wait for copies that the stage before owes; if they do not come, it has failed as well."""
        pipeline = self._pipeline
        if pipeline.options.journal == "servers" or first == 0:
            return True
        before = pipeline.stages[first - 1]
        block = pipeline.stages[first].start

        def known() -> bool:
            return pipeline.journal.complete(block) or before.failure is not None

        patience = pipeline.options.step_timeout if self.alone(before) else LATE_COPY
        if not await pipeline.wait(known, timeout=patience):
            pipeline.fail(before, DeadlineExceededError("it does not send copies of its outputs"))
        return not before.failure

    async def _introduce(self, stage: LiveStage) -> None:
        """Have the stage that follows let a new one push into the session, and nobody else."""
        pipeline = self._pipeline
        index = pipeline.stages.index(stage) + 1
        if index == len(pipeline.stages):
            return
        told, following = False, pipeline.stages[index]
        try:
            await pipeline.tell(following, AllowUpstream((stage.peer,)))
            told = True
        finally:
            if not told:
                error = SessionLostError("it was not told who comes before it now")
                pipeline.fail(following, error, blame=False)

    async def _open(
        self, first: int, last: int, *, blocked: Collection[PeerId] = (), heir_of: PeerId | None = None
    ) -> list[OpenStage]:
        pipeline = self._pipeline
        stages = pipeline.stages
        positions = pipeline.steps.positions
        return await open_chain(
            pipeline.node,
            self._planner,
            pipeline.model,
            Span(stages[first].start, stages[last].end),
            sequences=len(positions),
            tokens=sum(positions),
            reserve=sum(positions),
            timeout=pipeline.options.open_timeout,
            after=_hop_of(stages, first - 1),
            before=_hop_of(stages, last + 1),
            blocked=blocked,
            heir_of=heir_of,
        )

    async def _open_given(self, first: int, last: int, chain: Chain) -> list[OpenStage]:
        pipeline = self._pipeline
        positions = pipeline.steps.positions
        opened = await open_stages(
            pipeline.node,
            self._planner,
            pipeline.model,
            chain,
            sequences=len(positions),
            reserve=sum(positions),
            timeout=pipeline.options.open_timeout,
            after=_hop_of(pipeline.stages, first - 1),
            before=_hop_of(pipeline.stages, last + 1),
        )
        if isinstance(opened, Refusals):
            raise next(iter(opened.values()))
        return opened

    async def _caches_taken(self, stage: LiveStage, opened: OpenStage) -> bool:
        """Have ``stage`` send its caches to the server of ``opened``; whether all of them arrived."""
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stage.hand_over = failure
        answer = asyncio.create_task(opened.channel.receive(), name="session hand-over")
        try:
            answer.add_done_callback(lambda _: self._pipeline.look())
            await self._pipeline.tell(stage, TransferKv(opened.hop))
            if not await self._pipeline.wait(
                lambda: answer.done() or failure.done(), timeout=HAND_OVER_TIMEOUT
            ):
                return False
            if not answer.done():
                failure.result()
            record, positions = (await answer).record, self._pipeline.steps.positions
            if isinstance(record, KvTransferFailed):
                raise to_error(record.failure, opened.hop.peer)
            return (
                isinstance(record, KvTransferred)
                and len(record.lengths) == len(positions)
                and all(map(int.__ge__, record.lengths, positions))
            )
        finally:
            stage.hand_over = None
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    def _gave_up(self, error: SwarmError, reason: SwarmError | None = None) -> SwarmError:
        """``error`` as the caller is told of it, when there is to be no further attempt."""
        failures = self._retries.failures
        told = f"{error.message}; gave up after {self._pipeline.options.patience:.0f} s"
        if failures > MAX_FAILURES:
            told = f"{error.message}; gave up after {failures} failures in one step"
        if reason is not None:
            told += f" of looking for a replacement ({reason.message})" * (reason.message != error.message)
        gave_up = type(error)(told, **error.details)
        gave_up.origin = error.origin
        return gave_up

    def _tell(
        self,
        lost: Sequence[LiveStage],
        reason: SwarmError,
        stages: Sequence[LiveStage],
        how: str,
        seconds: float,
    ) -> None:
        self.failovers += 1
        failover = Failover(
            lost=_names(lost),
            reason=reason.message,
            took_over=_names(stages),
            tokens=sum(self._pipeline.steps.positions),
            how=how,
            seconds=seconds,
        )
        told = self._pipeline.options.on_failover
        logger.log(logging.WARNING if told is None else logging.INFO, "%s", failover)
        if told is not None:
            try:
                told(failover)
            except Exception:
                logger.exception("on_failover failed")


def _hop_of(stages: Sequence[LiveStage], index: int) -> Hop | None:
    return stages[index].opened.hop if 0 <= index < len(stages) else None


def _names(stages: Sequence[LiveStage]) -> str:
    return ", ".join(map(str, stages))


def _same_blocks(some: Sequence[Stage], others: Sequence[Stage]) -> bool:
    return bool(some) and (some[0].span.start, some[-1].span.end) == (
        others[0].span.start,
        others[-1].span.end,
    )


def _shutting_down() -> SwarmError:
    return SessionLostError("the server is shutting down")
