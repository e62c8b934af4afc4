"""Moving a live session while nothing of it is in flight: off servers that leave, and to better chains."""

from __future__ import annotations

import asyncio
import logging

from swarmcore.client.session.failover import FailoverHandler
from swarmcore.client.session.live_chain import LiveStage
from swarmcore.client.session.opening import OpenStage
from swarmcore.client.session.pipeline import Pipeline
from swarmcore.client.session.planner import Comparison
from swarmcore.client.session.window import StepWindow
from swarmcore.errors import SessionLostError, SwarmError
from swarmcore.routing.chain import Chain
from swarmcore.session.move_policy import MovePolicy
from swarmcore.tasks import BackgroundTasks, cancel_and_wait
from swarmcore.wire.failure import to_error
from swarmcore.wire.messages import KvTransferFailed, KvTransferred, TransferKv

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 5.0
"""Seconds between two looks for a better chain."""

MOVE_PAUSE = 1.0
"""Seconds between two attempts to move off a server that leaves."""

LONGEST_LEAVE = 600.0
"""Seconds for which that is tried, whatever the server says."""

KV_TRANSFER_TIMEOUT = 60.0
"""Seconds without progress after which a server that leaves cannot send its caches to another; its session
waits meanwhile."""


class SessionMoves:
    """Moves a session while its ``window`` is paused: no step is in flight then."""

    def __init__(self, pipeline: Pipeline, failover: FailoverHandler, window: StepWindow) -> None:
        self._pipeline, self._failover, self._window = pipeline, failover, window
        self.tasks = BackgroundTasks()
        now = asyncio.get_running_loop().time()
        self._policy = MovePolicy(now, pipeline.options.moves)
        self.next_check = now + CHECK_INTERVAL
        """When `look_for_better` is to be called again, after a step."""

    # --- servers that leave ------------------------------------------------------------------------------

    def on_draining(self, stage: LiveStage, seconds: float) -> None:
        """The server of ``stage`` leaves after so many seconds."""
        if not stage.leaving:
            stage.leaving = True
            self.tasks.start(self._move_off(stage, min(seconds, LONGEST_LEAVE)), "session move")

    async def _move_off(self, stage: LiveStage, seconds: float) -> None:
        """Move off a server that leaves, with nothing in flight; stay while nobody else has its blocks."""
        pipeline, loop = self._pipeline, asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while loop.time() < deadline:
            async with self._window.paused():
                if stage not in pipeline.stages or stage.failure is not None:
                    return
                try:
                    if await self._transfer_kv(stage, deadline - loop.time()):
                        return
                    if pipeline.options.journal != "off":
                        await self._replay_elsewhere(stage)
                        return
                except SwarmError as exc:
                    # If it stays so, the next step after the server is gone says what is wrong.
                    logger.info("could not move a session off %s: %s", stage, exc)
            await asyncio.sleep(MOVE_PAUSE)
        stage.leaving = False

    async def _transfer_kv(self, stage: LiveStage, seconds: float) -> bool:
        """Move the caches of a server that leaves to one other server; False when that cannot be done.

        Nothing is lost then: the stage works as before. Raise `MissingBlocksError` when nobody else has its
        blocks, and the last server's error when nobody takes the session.
        """
        pipeline, loop = self._pipeline, asyncio.get_running_loop()
        index, began = pipeline.stages.index(stage), loop.time()
        opened = await self._failover.open_stages(index, index, blocked=(stage.peer,), caches_from=stage.peer)
        try:
            async with asyncio.timeout(seconds):
                try:
                    if len(opened) > 1 or not await self._kv_arrived(stage, opened[0]):
                        raise SessionLostError("the caches are not those of the session")
                except BaseException:
                    for each in opened:
                        each.channel.abort("the session was not moved here")
                    raise
        except (SwarmError, TimeoutError) as exc:
            logger.info("%s could not hand its caches over: %s", stage, exc)
            return False
        stages = pipeline.replace(index, index, opened)
        await self._failover.allow_upstream(stages[-1])
        self._failover.report([stage], _shutting_down(), stages, "handed over", loop.time() - began)
        return True

    async def _kv_arrived(self, stage: LiveStage, opened: OpenStage) -> bool:
        """Have ``stage`` send its caches to the server of ``opened``; whether all of them arrived."""
        pipeline = self._pipeline
        stage.kv_transfer = failure = asyncio.get_running_loop().create_future()
        answer = asyncio.create_task(opened.channel.receive(), name="session KV transfer")
        try:
            answer.add_done_callback(lambda _: pipeline.check_awaited())
            await pipeline.send_to(stage, TransferKv(opened.hop))
            if not await pipeline.wait(lambda: answer.done() or failure.done(), timeout=KV_TRANSFER_TIMEOUT):
                return False
            if not answer.done():
                failure.result()
            record, positions = (await answer).record, pipeline.steps.positions
            if isinstance(record, KvTransferFailed):
                raise to_error(record.failure, opened.hop.peer)
            return (
                isinstance(record, KvTransferred)
                and len(record.lengths) == len(positions)
                and all(map(int.__ge__, record.lengths, positions))
            )
        finally:
            stage.kv_transfer = None
            await cancel_and_wait(answer)

    async def _replay_elsewhere(self, stage: LiveStage) -> None:
        index = self._pipeline.stages.index(stage)
        await self._failover.rebuild(index, index, _shutting_down(), blocked=(stage.peer,))
        await self._failover.replace_failed()

    # --- better chains -----------------------------------------------------------------------------------

    def look_for_better(self, steps_done: int) -> None:
        """Begin to move if a better chain has been there for long enough."""
        pipeline, now = self._pipeline, asyncio.get_running_loop().time()
        self.next_check = now + CHECK_INTERVAL
        if pipeline.options.moves is None or pipeline.options.journal == "off" or self.tasks:
            return
        try:
            found = pipeline.planner.compare(pipeline.chain, tokens=sum(pipeline.steps.positions))
        except SwarmError:
            return  # blocks are missing: no time for luxuries
        if found is not None and self._policy.should_move(
            now,
            current=found.current,
            better=found.better,
            target=found.chain.peers,
            tokens=steps_done,
            replay=found.replay,
        ):
            self.tasks.start(self._move_to(found), "session move")

    async def _move_to(self, found: Comparison) -> None:
        async with self._window.paused():
            why = f"{1000 * found.better:.0f} rather than {1000 * found.current:.0f} ms a token elsewhere"
            try:
                await self._replace_parts(found.chain, SessionLostError(why))
            except SwarmError as exc:
                logger.info("could not move a session to %s: %s", found.chain, exc)
            self._policy.moved(asyncio.get_running_loop().time())

    async def _replace_parts(self, better: Chain, reason: SwarmError) -> None:
        """Turn the chain into ``better``, one different part after the other; each is opened before the old
        one is left. Raise what a new server refuses with; the session is whole all the same.
        """
        for first, last, part in self._pipeline.chain.replacements(better):
            old = self._pipeline.chain.stages[first : last + 1]
            ends = (part.stages[0].span.start, part.stages[-1].span.end)
            if not old or (old[0].span.start, old[-1].span.end) != ends:
                return  # a failure has changed the chain meanwhile
            await self._failover.rebuild(first, last, reason, part)
            await self._failover.replace_failed()


def _shutting_down() -> SwarmError:
    return SessionLostError("the server is shutting down")
