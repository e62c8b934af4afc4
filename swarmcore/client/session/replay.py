"""Filling the caches of stages that are new to a session, from its journal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from swarmcore.client.session.live_chain import LiveStage
from swarmcore.client.session.pipeline import PendingChunk, Pipeline
from swarmcore.errors import DeadlineExceededError
from swarmcore.wire.messages import Replay

REPLAY_ROWS = 1024
"""Longest piece of a replay, in tokens over all sequences."""

REPLAYS_IN_FLIGHT = 4


async def replay(
    pipeline: Pipeline, first: int, stages: Sequence[LiveStage], *, rows: int = REPLAY_ROWS
) -> bool:
    """Fill the caches of new ``stages``, of which the first is number ``first``, up to what is settled.

    In pieces of ``rows`` at most. False when one that takes part has failed.
    """
    end = stages[-1].end
    positions = missing_from = pipeline.steps.positions
    copied = pipeline.options.journal == "client" and end < pipeline.model.blocks
    if copied and not pipeline.journal.complete(end):
        missing_from = pipeline.journal.rebuild(end, positions)
    steps, inner = pipeline.steps, [stage.start for stage in stages[1:]]
    nothing = (0,) * len(positions)
    known = steps.replay(nothing, missing_from, until=end, reply="none", chunk_rows=rows)
    unknown = steps.replay(missing_from, positions, until=end, reply="all", chunk_rows=rows)
    pieces = [(chunk, inner) for chunk in known] + [(chunk, [*inner, end]) for chunk in unknown]
    chunks: list[PendingChunk] = []
    try:
        for chunk, blocks in pieces:
            if pipeline.options.journal == "client":
                for block in blocks:
                    pipeline.journal.expect(block, chunk)
            chunks.append(pipeline.begin(chunk))
            await _send(pipeline, first, chunks[-1])
            late = chunks[-REPLAYS_IN_FLIGHT:]
            if len(late) == REPLAYS_IN_FLIGHT and not await _done(pipeline, late[0], first, stages):
                return False
        for pending in chunks[-REPLAYS_IN_FLIGHT:]:
            if not await _done(pipeline, pending, first, stages):
                return False
        return True
    finally:
        for pending in chunks:
            pipeline.forget(pending)


async def _send(pipeline: Pipeline, first: int, pending: PendingChunk) -> None:
    options, chunk = pipeline.options, pending.chunk
    pending.reached = pending.sent = pipeline.stages[first].start
    if first and options.journal == "servers":
        step = pipeline.steps.step_for(
            first, chunk, codec=pipeline.codec, deadline=options.step_timeout, journal="servers"
        )
        chain = (pipeline.steps.hops[first], *step.chain)
        order = Replay(
            step.step,
            step.starts,
            step.lengths,
            chain,
            codec=pipeline.codec,
            deadline=step.deadline,
            settled=step.settled,
        )
        pending.sent = pipeline.stages[first - 1].start
        await pipeline.send_to(pipeline.stages[first - 1], order)
        return
    rows = pipeline.journal.rows(pipeline.stages[first].start, chunk.starts, chunk.lengths)
    await pipeline.send(first, pending, rows.encode(pipeline.codec))


async def _done(pipeline: Pipeline, pending: PendingChunk, first: int, stages: Sequence[LiveStage]) -> bool:
    """Wait for the answer to a replay; False when one of those who take part has failed."""
    taking_part = [*pipeline.stages[max(first - 1, 0) : first], *stages]

    def settled() -> bool:
        return pending.done or pending.error is not None or any(stage.failure for stage in taking_part)

    loop, patience = asyncio.get_running_loop(), pipeline.options.step_timeout
    while not await pipeline.wait(settled, timeout=patience):
        stage = pipeline.stuck_at(pending)
        verdict = pipeline.patience.judge(loop.time(), held=stage.holds_step, alone=pipeline.alone(stage))
        if verdict in ("replace", "give up"):
            pipeline.blame_stuck(pending, DeadlineExceededError("it did not rebuild its caches in time"))
            break
    if pending.error is not None:
        pipeline.fail(pending.refused_by or stages[-1], pending.error)
    return pending.done
