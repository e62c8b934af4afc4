"""One session on a server: runs its steps in order and sends each output straight to the next stage."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial

import attrs

from swarmcore.engine.engine import Engine
from swarmcore.errors import (
    InternalError,
    InvalidStepError,
    ProtocolError,
    SessionLostError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.resources import Reservation
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.client_outbox import ClientOutbox, InFlightBytes
from swarmcore.server.downstream import Downstream, StageDialer
from swarmcore.server.kv_transfer import KvTransfer
from swarmcore.server.output_cache import AnswerCache, RecalledSteps, ReplayCache, Reply
from swarmcore.server.upstream import AllowedUpstream
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import PeerId, Span, short
from swarmcore.wire.failure import to_failure
from swarmcore.wire.forward_backward import AdapterPart
from swarmcore.wire.framing import Message
from swarmcore.wire.limits import MAX_STEPS_IN_FLIGHT
from swarmcore.wire.messages import (
    AllowUpstream,
    Arrival,
    CachePart,
    Draining,
    Hop,
    NamePages,
    OpenSession,
    Recall,
    Replay,
    SessionState,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
)
from swarmcore.wire.prefix_names import check_names
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)


class ServerSession:
    """A client's session on this server; lives as long as the client's channel.

    Messages come in by `receive_from`, from the client or from the stage before; from `start` on one task
    deals with them in order: it awaits the outputs of steps and sends them out again.
    """

    def __init__(
        self,
        opening: OpenSession,
        *,
        engine: Engine,
        node: Node,
        dialer: StageDialer,
        client: Channel,
        counters: Counter[str],
    ) -> None:
        self.id = opening.session
        self.span = Span(opening.start, opening.end)
        self.upstream = AllowedUpstream(opening.pushers)
        self.lifetime = asyncio.timeout(None)
        """Ends when the server has to let go of the session, by `end`."""
        self._sequences = opening.sequences
        self._engine = engine
        self._counters = counters
        self._in_flight = InFlightBytes(node.resources, client.remote)
        self._client = ClientOutbox(client, self._in_flight)
        self._downstream = Downstream(dialer, client.remote, counters)
        self._kv_transfer = KvTransfer(
            session=opening.session,
            engine=engine,
            dialer=dialer,
            client=self._client,
            in_flight=self._in_flight,
            counters=counters,
        )
        self._answers = AnswerCache(node.resources, client.remote, counters)
        self._replay_cache = ReplayCache(
            opening.sequences,
            executor=engine.executor,
            resources=node.resources,
            client=client.remote,
            counters=counters,
            limits=node.limits,
        )
        self._slots = asyncio.Semaphore(MAX_STEPS_IN_FLIGHT)
        self._jobs: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._outputs: dict[asyncio.Future[Tensor], Step | None] = {}
        """Of steps that are computed; None for one that is a repetition."""
        self._recalled = RecalledSteps()
        self._verified: tuple[int, ...] = ()
        """Where each sequence ended after a step of drafts."""
        self._under_way = 0
        """Steps and orders taken in and not dealt with."""
        self._closed = False
        self._drain_seconds: float | None = None
        self._worker: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return (
            f"<ServerSession {self.id[:8]} [{self.span}] of {short(self.client)} · "
            f"{self._jobs.qsize()} steps in flight>"
        )

    @property
    def client(self) -> PeerId:
        return self._client.peer

    @property
    def state(self) -> SessionState:
        """How far its steps are."""
        rows, waits = self._engine.progress(self.id)
        holds, work = self._under_way > 0, self._engine.work
        return SessionState(known=True, holds=holds, waits_for_room=waits, rows=rows, work=work)

    async def dial(self, hop: Hop) -> bool:
        """As `Downstream.dial`, before `start`."""
        return await self._downstream.dial(hop)

    def start(self) -> None:
        """Begin to send outputs; steps are taken in before that, as many as there is room for."""
        self._worker = asyncio.create_task(self._work(), name="session outputs")

    async def announce_drain(self, seconds: float) -> None:
        """Tell the client that it has so long to move the session elsewhere."""
        if self._worker is None:
            self._drain_seconds = seconds  # the client is yet to hear that the session is granted
        else:
            await self._client.send(Draining(seconds))

    def end(self) -> None:
        """End the `lifetime`: the client has had its time to move the session elsewhere."""
        if not self.lifetime.expired():
            self.lifetime.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Cancel what is in flight and free the session's cache."""
        self._closed = True
        for output in self._outputs:
            output.cancel()
        self.upstream.close()
        # Before anything is awaited, so that the cache is free whatever else comes.
        self._engine.close_session(self.id)
        self._answers.close()
        self._replay_cache.close()
        self._in_flight.close()
        worker, self._worker = self._worker, None  # how it ended holds its frame, which holds this object
        async with AsyncExitStack() as ending:  # of all of it, also for a caller that is cancelled meanwhile
            ending.push_async_callback(self._downstream.close)
            ending.push_async_callback(self._client.close)
            await cancel_and_wait(worker)
            while not self._jobs.empty():
                self._jobs.get_nowait()

    # --- what comes in -----------------------------------------------------------------------------------

    async def receive_from(self, channel: Channel, *, is_client: bool) -> None:
        """Take in all that comes by ``channel``, until its end; the client learns what comes of it.

        Raise `SessionLostError` when the session is closed, `InvalidStepError` for what only the client may
        ask for, `ProtocolError` for a step without its tensor.
        """
        try:
            while True:
                message = await channel.receive()
                if isinstance(message.record, Step):
                    await self._accept_step(message.record, message.tensor("hidden"), from_client=is_client)
                else:
                    await self._accept(message, from_client=is_client)
        except StreamClosedError:
            logger.debug("%r: %s has ended its stream", self, channel.remote)

    async def _accept(self, message: Message, *, from_client: bool) -> None:
        """Deal with a message that brings no step; wait while too much is in flight."""
        record = message.record
        if isinstance(record, CachePart):
            await self._kv_transfer.receive(record, message.tensors)
        elif isinstance(record, AdapterPart):
            raise ProtocolError("the weights of an adapter came that were not asked for")
        elif not from_client:
            raise InvalidStepError(f"only the client of a session may send {message.kind}")
        elif isinstance(record, AllowUpstream):
            self.upstream.allow_only(record.pushers)
        elif isinstance(record, Recall):
            self._recall(record)
        elif isinstance(record, NamePages):
            check_names(record.names, self._sequences)
            self._engine.name_prefixes(self.id, record.names)
        elif isinstance(record, Replay):
            self._downstream.abort_unless(record.chain[0] if record.chain else None)
            await self._wait_for_slot()
            self._jobs.put_nowait(partial(self._replay, record))
        else:
            await self._wait_for_slot()
            self._jobs.put_nowait(partial(self._kv_transfer.send, record))

    async def _accept_step(self, step: Step, hidden: Tensor, *, from_client: bool) -> None:
        if not from_client and not step.replay and self._answers.outdated(step):
            self._counters["steps_outdated"] += 1  # of a stage that was replaced, and has only now woken up
            return
        if step in self._recalled:
            self._dropped(step)
            return
        arrival = None
        if step.sent is not None:
            arrival = Arrival(hidden.data.nbytes, asyncio.get_running_loop().time() - step.sent)
        self._downstream.abort_unless(step.chain[0] if step.chain else None)
        try:
            reserved = await self._in_flight.acquire([hidden], step.deadline)
        except SwarmError as exc:
            await self._report(step.step, exc, step.attempt)
            return
        try:
            await self._wait_for_slot()
        except BaseException:
            self._in_flight.release(reserved)
            raise
        fresh = True
        try:
            if step in self._recalled:  # since it waits
                raise InvalidStepError("the step was called back")
            output, fresh = self._submit(step, hidden)
        except SwarmError as exc:
            output = asyncio.get_running_loop().create_future()
            output.set_exception(exc.with_traceback(None))
        self._outputs[output] = step if fresh else None
        output.add_done_callback(self._computed)
        self._jobs.put_nowait(partial(self._finish, step, output, fresh, reserved, arrival))

    def _recall(self, recall: Recall) -> None:
        """Drop what has not been computed of steps that the client has no more use for."""
        self._recalled.add(recall)
        queued = [(output, step) for output, step in self._outputs.items() if step is not None]
        # What a later step makes of the caches when it reorders them depends on all that come before it.
        reordered = max((step.step for _, step in queued if step.sources), default=-1)
        dead = {output for output, step in queued if step in self._recalled and step.step > reordered}
        self._engine.withdraw(self.id, dead)
        self._answers.recall(recall)
        self._replay_cache.recall(recall)

    def _dropped(self, step: Step) -> None:
        self._counters["steps_recalled"] += 1
        self._counters["rows_recalled"] += sum(step.lengths)

    async def _wait_for_slot(self) -> None:
        """Until one of the `MAX_STEPS_IN_FLIGHT` is free; `_work` gives it back."""
        await self._slots.acquire()
        if self._closed:
            raise SessionLostError(f"session {self.id[:8]} was closed")
        self._under_way += 1

    # --- steps -------------------------------------------------------------------------------------------

    def _submit(self, step: Step, hidden: Tensor) -> tuple[asyncio.Future[Tensor], bool]:
        """Queue the step in the engine; return its future output, and whether it is new, not a repetition."""
        self._check_chain(step.chain)
        whole = step.chain or step.reply == "all" or (step.reply == "none" and step.journal == "servers")
        reply: Reply = "all" if whole else "last"
        if not step.replay and (earlier := self._answers.find(step, reply)) is not None:
            self._counters["steps_repeated"] += 1
            return earlier, False
        output = self._engine.step(
            self.id,
            step.starts,
            step.lengths,
            hidden,
            reply=reply,
            codec=step.output_codec,
            timeout=step.deadline,
            sources=step.sources,
        )
        self._counters["steps_computed"] += 1
        self._count_drafts(step)
        if not step.replay:
            self._answers.add(step, reply, output)
        return output, True

    def _count_drafts(self, step: Step) -> None:
        """Of rows that are all asked for, several in a step, and of those the next step takes back."""
        if step.replay:
            return
        ends, self._verified = self._verified, ()
        back = sum(max(end - start, 0) for end, start in zip(ends, step.starts, strict=False))
        self._counters["rows_taken_back"] += back
        if step.reply == "all" and max(step.lengths) > 1:
            self._verified = tuple(map(sum, zip(step.starts, step.lengths, strict=True)))
            self._counters["steps_verified"] += 1
            self._counters["rows_verified"] += sum(step.lengths)

    def _check_chain(self, chain: Sequence[Hop]) -> None:
        """Raise unless every stage begins where the one before ends: no step goes round in circles."""
        end = self.span.end
        for hop in chain:
            if not end == hop.start < hop.end <= self._engine.executor.model.blocks:
                raise InvalidStepError(f"a chain with blocks {hop.start}:{hop.end} after block {end}")
            end = hop.end

    def _computed(self, output: asyncio.Future[Tensor]) -> None:
        self._outputs.pop(output, None)
        if not output.cancelled():
            output.exception()  # seen, also when the session ends before anyone awaits it

    async def _work(self) -> None:
        if self._drain_seconds is not None:
            await self._client.send(Draining(self._drain_seconds))
        while True:
            job = await self._jobs.get()
            try:
                await job()
            except Exception:
                logger.exception("session %s failed unexpectedly", self.id[:8])
            finally:
                self._under_way -= 1
                self._slots.release()

    async def _finish(
        self,
        step: Step,
        output: asyncio.Future[Tensor],
        fresh: bool,
        reserved: Reservation | None,
        arrival: Arrival | None,
    ) -> None:
        try:
            hidden = await output
            if step in self._recalled:
                return
            await self._deliver(step, hidden, arrival)
            if fresh and step.journal == "servers" and hidden.shape[0] == sum(step.lengths):
                self._replay_cache.add(step, hidden)
        except SwarmError as exc:
            if step in self._recalled:
                self._dropped(step)
                return
            await self._report(step.step, exc, step.attempt)
        except Exception:
            logger.exception("session %s: step %d failed unexpectedly", self.id[:8], step.step)
            failed = InternalError("the server failed on this step; its log says why")
            await self._report(step.step, failed, step.attempt)
        finally:
            del output  # its error holds this frame
            self._in_flight.release(reserved)

    async def _deliver(self, step: Step, output: Tensor, arrival: Arrival | None) -> None:
        """Send an output where it has to go, and only then tell the client of it."""
        undelivered = ""
        sent = asyncio.get_running_loop().time() if step.sent is not None else None
        if step.chain:
            try:
                await self._downstream.push(
                    step.chain[0], attrs.evolve(step, chain=step.chain[1:], sent=sent), output
                )
            except SwarmError as exc:
                # Not why: what answers where is none of a client's business.
                logger.debug("session %s: step %d was not pushed: %s", self.id[:8], step.step, exc)
                undelivered = "the next stage was not reached"
            else:
                if step.journal != "off":
                    copy = (output,) if step.journal == "client" else ()
                    await self._client.copy(
                        StepForwarded(step.step, self.span.end, step.attempt, arrival), *copy
                    )
                return
        self._counters["steps_answered"] += 1
        answer = (output,) if step.chain or step.reply != "none" else ()
        record = StepOutput(step.step, self.span.end, undelivered, step.attempt, arrival, sent)
        await self._client.send(record, *answer)

    async def _report(self, step: int, error: SwarmError, attempt: int = 0) -> None:
        self._counters["steps_refused"] += 1
        logger.info("session %s: step %d refused: %s", self.id[:8], step, error)
        await self._client.send(StepFailed(step, to_failure(error), attempt))

    async def _replay(self, order: Replay) -> None:
        """Send kept outputs to a stage that is new to the session."""
        step = Step(
            order.step,
            order.starts,
            order.lengths,
            chain=order.chain[1:],
            reply="none",
            codec=order.codec,
            deadline=order.deadline,
            journal="servers",
            replay=True,
        )
        try:
            if not order.chain:
                raise InvalidStepError("a replay has to name the stage that it is for")
            self._check_chain(order.chain)
            rows = await self._replay_cache.rows(order)
            await self._downstream.push(order.chain[0], step, rows)
            self._counters["replays_sent"] += 1
        except SwarmError as exc:
            await self._report(order.step, exc)
