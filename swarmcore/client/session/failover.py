"""Failover: replacing the stages of a session that are lost, and giving the new ones their caches.

Section 3.2 and Algorithm 1 of the paper, with the replay in one go, and for missing blocks only.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Sequence

from swarmcore.client.session.live_chain import LiveStage, chain_of
from swarmcore.client.session.opening import ChainOpener, OpenStage, Refusals, located
from swarmcore.client.session.options import Failover
from swarmcore.client.session.pipeline import PendingChunk, Pipeline
from swarmcore.client.session.replay import REPLAY_ROWS, replay
from swarmcore.errors import DeadlineExceededError, ServerMemoryError, SessionLostError, SwarmError
from swarmcore.routing.chain import Chain, numerics_text
from swarmcore.session.patience import MAX_FAILURES, RetryPolicy
from swarmcore.types import PeerId, Span
from swarmcore.wire.messages import AllowUpstream, Hop

logger = logging.getLogger(__name__)

LATE_COPY = 5.0
"""Seconds without any copy after which a server that still owes some is given up, although it lives, if
somebody else has its blocks."""

SHORTEST_REPLAY = 16
"""Rows of a replay in one piece, at least, however little memory a server has."""


class FailoverHandler:
    """Keeps a pipeline whole. Used by one task at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.failovers = 0
        self.retries = RetryPolicy(pipeline.options.patience)
        """Told of every step that gets through."""
        self._pipeline = pipeline
        self._replay_rows = REPLAY_ROWS

    async def pause_after(self, error: SwarmError, where: LiveStage) -> None:
        """Leave a server alone for a while that has no room, memory or time for a step; raise ``error`` when
        it has been so for `SessionOptions.patience` seconds."""
        pause = self.retries.failed(asyncio.get_running_loop().time(), error)
        if pause == math.inf:
            raise self._gave_up(located(where, error))
        logger.info("%s: %s; again in %.1f s", where, error, pause)
        await asyncio.sleep(pause)

    async def replace_failed(self) -> None:
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
                if await self.rebuild(*found, reason):
                    self.retries.replaced()
                    continue
                failed = next((each for each in pipeline.stages if each.failure), None)
                error = failed.failure if failed is not None else None
            except SwarmError as exc:
                error = exc
            if error is None:
                continue
            if isinstance(error, ServerMemoryError):
                self._replay_rows = max(self._replay_rows // 4, SHORTEST_REPLAY)
            pause = self.retries.failed(loop.time(), error)
            if pause == math.inf:
                raise self._gave_up(error, reason) from error
            logger.info("no replacement for %s yet: %s", _names(lost), error)
            await asyncio.sleep(pause)

    async def resend(self, in_flight: Collection[PendingChunk]) -> None:
        """Send chunks under way again, from the last place that is known to have them, under their numbers.

        Stages that are newer than the chunks get all of them; others answer those that they know already from
        their dedup cache.
        """
        if not in_flight:
            return
        pipeline = self._pipeline
        oldest = min(pending.chunk.step for pending in in_flight)
        newer = (i for i, stage in enumerate(pipeline.stages) if stage.first_step > oldest)
        index = next(newer, len(pipeline.stages) - 1)
        while index and not all(
            pipeline.journal.has(pipeline.stages[index].start, pending.chunk.step) for pending in in_flight
        ):
            index -= 1
        start = pipeline.stages[index].start
        for pending in in_flight:
            if pending.chunk.step not in pipeline.pending:
                continue  # it was called back meanwhile
            # Also one that was through already: until a new stage has it, nothing may follow it there.
            pending.done, pending.output, pending.error = False, None, None
            pending.attempt += 1
            pending.reached = pending.sent = start
            await pipeline.send(index, pending, pipeline.journal.in_flight(start, pending.chunk.step))

    # --- one replacement ---------------------------------------------------------------------------------

    async def rebuild(
        self,
        first: int,
        last: int,
        reason: SwarmError,
        chain: Chain | None = None,
        *,
        blocked: Collection[PeerId] = (),
    ) -> bool:
        """Replace some stages in a row, by those of ``chain`` or the best there are but for ``blocked``.

        With those before them, where nobody has what these computed before the session began. False when more
        stages have failed meanwhile.
        """
        pipeline, loop = self._pipeline, asyncio.get_running_loop()
        began = loop.time()
        if not await self._inputs_are_known(first):
            return False
        if self._inputs_lack_beginning(first):
            if chain is not None:
                chain = Chain((*pipeline.chain.stages[:first], *chain.stages))
            first = 0
        lost = pipeline.stages[first : last + 1]
        opened = await self.open_stages(first, last, chain, blocked=blocked)
        stages = pipeline.replace(first, last, opened)
        replayed = False
        try:
            await self.allow_upstream(stages[-1])
            replayed = await replay(pipeline, first, stages, rows=self._replay_rows)
        finally:
            if not replayed:
                for stage in stages:
                    error = SessionLostError("the session's caches could not be rebuilt there")
                    pipeline.fail(stage, error, blame=False)
        if replayed:
            self.report(lost, reason, stages, "replayed", loop.time() - began)
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

        patience = pipeline.options.step_timeout if pipeline.alone(before) else LATE_COPY
        if not await pipeline.wait(known, timeout=patience):
            pipeline.fail(before, DeadlineExceededError("it does not send copies of its outputs"))
        return not before.failure

    def _inputs_lack_beginning(self, first: int) -> bool:
        """Whether the first inputs of a stage came from pages that servers had kept: nobody can replay them.

        The client has the first stage's.
        """
        pipeline = self._pipeline
        if first == 0:
            return False
        if pipeline.options.journal == "servers":
            return pipeline.stages[first - 1].lacks_outputs
        return pipeline.journal.lacks(pipeline.stages[first].start, pipeline.steps.positions)

    async def open_stages(
        self,
        first: int,
        last: int,
        chain: Chain | None = None,
        *,
        blocked: Collection[PeerId] = (),
        caches_from: PeerId | None = None,
    ) -> list[OpenStage]:
        """Open the stages of ``chain``, or the best there are, for the blocks of ``first`` to ``last``."""
        pipeline = self._pipeline
        stages, positions = pipeline.stages, pipeline.steps.positions
        lost = chain_of(stages[first : last + 1]).numerics
        opener = ChainOpener(
            node=pipeline.node,
            planner=pipeline.planner,
            model=pipeline.model,
            sequences=len(positions),
            reserve=sum(positions),
            timeout=pipeline.options.open_timeout,
            after=_hop_of(stages, first - 1),
            before=_hop_of(stages, last + 1),
            caches_from=caches_from,
            like=lost[0] if len(lost) == 1 else None,
            prefix=pipeline.prefix,
        )
        if chain is None:
            span = Span(stages[first].start, stages[last].end)
            return await opener.open_best(span, tokens=sum(positions), blocked=blocked)
        opened = await opener.open_given(chain)
        if isinstance(opened, Refusals):
            raise next(iter(opened.values()))
        return opened

    async def allow_upstream(self, stage: LiveStage) -> None:
        """Have the stage that follows let a new one push into the session, and nobody else."""
        pipeline = self._pipeline
        index = pipeline.stages.index(stage) + 1
        if index == len(pipeline.stages):
            return
        sent, following = False, pipeline.stages[index]
        try:
            await pipeline.send_to(following, AllowUpstream((stage.peer,)))
            sent = True
        finally:
            if not sent:
                error = SessionLostError("it was not informed who comes before it now")
                pipeline.fail(following, error, blame=False)

    def report(
        self,
        lost: Sequence[LiveStage],
        reason: SwarmError,
        stages: Sequence[LiveStage],
        how: str,
        seconds: float,
    ) -> None:
        """Count a failover, log it, and tell `SessionOptions.on_failover`."""
        self.failovers += 1
        before, after = chain_of(lost).numerics, chain_of(stages).numerics
        failover = Failover(
            lost=_names(lost),
            reason=reason.message,
            took_over=_names(stages),
            tokens=sum(self._pipeline.steps.positions),
            how=how,
            seconds=seconds,
            numerics=""
            if set(after) <= set(before)
            else f"{numerics_text(before)} to {numerics_text(after)}",
        )
        callback = self._pipeline.options.on_failover
        logger.log(logging.WARNING if callback is None else logging.INFO, "%s", failover)
        if callback is not None:
            try:
                callback(failover)
            except Exception:
                logger.exception("on_failover failed")

    def _gave_up(self, error: SwarmError, reason: SwarmError | None = None) -> SwarmError:
        """``error`` as the caller is told of it, when there is to be no further attempt."""
        failures = self.retries.failures
        text = f"{error.message}; gave up after {self._pipeline.options.patience:.0f} s"
        if failures > MAX_FAILURES:
            text = f"{error.message}; gave up after {failures} failures in one step"
        if reason is not None:
            text += f" of looking for a replacement ({reason.message})" * (reason.message != error.message)
        gave_up = type(error)(text, **error.details)
        gave_up.origin = error.origin
        return gave_up


def _hop_of(stages: Sequence[LiveStage], index: int) -> Hop | None:
    return stages[index].opened.hop if 0 <= index < len(stages) else None


def _names(stages: Sequence[LiveStage]) -> str:
    return ", ".join(map(str, stages))
