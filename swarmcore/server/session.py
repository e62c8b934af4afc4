"""One session on a server: runs its steps in order and sends each output straight to the next stage."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal

import attrs

from swarmcore.engine.engine import Engine
from swarmcore.errors import InternalError, InvalidStepError, ProtocolError, SessionLostError, SwarmError
from swarmcore.resources import Reservation
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.arrivals import InFlightBytes
from swarmcore.server.kept import Kept
from swarmcore.server.kept_for_replay import ReplayOutputs
from swarmcore.server.kv_transfer import KvTransfer
from swarmcore.server.links import ClientOutbox, Downstream
from swarmcore.server.next_hops import StageDialer
from swarmcore.server.upstream import AllowedUpstream
from swarmcore.session.dedup import DedupCache
from swarmcore.types import PeerId, Span, short
from swarmcore.wire.failure import to_failure
from swarmcore.wire.framing import Message
from swarmcore.wire.messages import (
    AllowUpstream,
    CachePart,
    Draining,
    Hop,
    Replay,
    SessionState,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
)
from swarmcore.wire.passes import AdapterPart
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 4
"""Steps of one session that a server takes in before it stops reading; enough to overlap prefill chunks."""

STEPS_REMEMBERED = 16
"""Answers kept for steps that come again; more than a client has under way at once."""


@attrs.frozen
class _Answer:
    """What a step comes to, and in which form it was asked for."""

    reply: Literal["all", "last"]
    codec: str
    output: asyncio.Future[Tensor]

    @property
    def nbytes(self) -> int:
        """Memory that it takes once it is there; before that it is work in line."""
        if not self.output.done() or self.output.cancelled() or self.output.exception() is not None:
            return 0
        return self.output.result().data.nbytes


class ServerSession:
    """A client's session on this server; lives as long as the client's channel.

    Messages come in by `accept`, from the client or from the stage before; from `start` on one task deals
    with them in order: it awaits the outputs of steps and sends them out again.
    """

    def __init__(
        self,
        session: str,
        span: Span,
        sequences: int,
        *,
        engine: Engine,
        node: Node,
        hops: StageDialer,
        client: Channel,
        pushers: AllowedUpstream,
        counters: Counter[str],
    ) -> None:
        self.session = session
        self.span = span
        self.pushers = pushers
        self._engine = engine
        self._arrivals = InFlightBytes(node.resources, client.remote)
        self._client = ClientOutbox(client, self._arrivals)
        self._next = Downstream(hops, client.remote, counters)
        self._counters = counters
        self._ledger: DedupCache[_Answer] = DedupCache(depth=STEPS_REMEMBERED)
        self._answers_held = Kept(node.resources, client.remote, self._drop_answers)
        self._hand_over = KvTransfer(
            session,
            engine=engine,
            hops=hops,
            client=self._client,
            arrivals=self._arrivals,
            counters=counters,
        )
        self._kept_outputs = ReplayOutputs(
            sequences,
            executor=engine.executor,
            resources=node.resources,
            client=client.remote,
            counters=counters,
            limits=node.limits,
        )
        self._room = asyncio.Semaphore(MAX_STEPS_IN_FLIGHT)
        self._jobs: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._outputs: dict[asyncio.Future[Tensor], None] = {}
        self._under_way = 0
        """Steps and orders taken in and not dealt with."""
        self._closed = False
        self._leaving: float | None = None
        self._worker: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return (
            f"<ServerSession {self.session[:8]} [{self.span}] of {short(self._client.client)} · "
            f"{self._jobs.qsize()} steps in flight>"
        )

    @property
    def client(self) -> PeerId:
        return self._client.client

    @property
    def state(self) -> SessionState:
        """How far its steps are."""
        return SessionState(
            known=True,
            holds=self._under_way > 0,
            waits_for_room=self._engine.waits_for_room(self.session),
            rows=self._engine.computed(self.session),
            work=self._engine.work,
        )

    def start(self) -> None:
        """Begin to send outputs; steps are taken in before that, as many as there is room for."""
        self._worker = asyncio.create_task(self._work(), name="session outputs")

    async def accept(self, message: Message, *, from_client: bool) -> None:
        """Deal with a message; wait while too much is in flight. What comes of it, the client is told.

        Raise `SessionLostError` when the session is closed, `InvalidStepError` for what only the client may
        ask for, `ProtocolError` for a step without its tensor.
        """
        record = message.record
        if isinstance(record, CachePart):
            await self._hand_over.take(record, message.tensors)
            return
        if isinstance(record, AdapterPart):
            raise ProtocolError("the weights of an adapter came that were not asked for")
        if not from_client and not isinstance(record, Step):
            raise InvalidStepError(f"only the client of a session may send {message.kind}")
        if isinstance(record, AllowUpstream):
            self.pushers.change(record.pushers)
            return
        hidden = message.tensor("hidden") if isinstance(record, Step) else None
        if not from_client and not record.replay and self._ledger.outdated(record):
            self._counters["steps_outdated"] += 1  # of a stage that was replaced, and has only now woken up
            return
        chain = record.chain if isinstance(record, Step | Replay) else ()
        self._next.give_up_unless(chain[0] if chain else None)
        held = None
        if hidden is not None:
            try:
                held = await self._arrivals.hold([hidden], record.deadline)
            except SwarmError as exc:
                await self._report(record.step, exc, record.attempt)
                return
        try:
            await self._room.acquire()
            if self._closed:
                raise SessionLostError(f"session {self.session[:8]} was closed")
        except BaseException:
            self._arrivals.let_go(held)
            raise
        self._under_way += 1
        if hidden is not None:
            self._jobs.put_nowait(self._begin(record, hidden, held))
        elif isinstance(record, Replay):
            self._jobs.put_nowait(partial(self._replay, record))
        else:
            self._jobs.put_nowait(partial(self._hand_over.send, record))

    async def dial(self, hop: Hop) -> bool:
        """Connect to the stage that will follow, before `start`; False when it cannot be reached."""
        try:
            await self._next.dial(hop)
        except SwarmError as exc:
            logger.debug("session %s: cannot reach %s: %s", self.session[:8], short(hop.peer), exc)
            return False
        return True

    async def announce_drain(self, seconds: float) -> None:
        """Tell the client that it has so long to move the session elsewhere."""
        if self._worker is None:
            self._leaving = seconds  # the client is yet to hear that the session is granted
        else:
            await self._client.send(Draining(seconds))

    async def close(self) -> None:
        """Cancel what is in flight and free the session's cache."""
        self._closed = True
        for output in self._outputs:
            output.cancel()
        self.pushers.close()
        # Before anything is awaited, so that the cache is free whatever else comes.
        self._engine.close_session(self.session)
        self._answers_held.close()
        self._kept_outputs.close()
        self._arrivals.close()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await self._client.close()
        await self._next.close()

    # --- steps -------------------------------------------------------------------------------------------

    def _begin(self, step: Step, hidden: Tensor, held: Reservation | None) -> Callable[[], Awaitable[None]]:
        """Put the step in the engine's line; return what is to be done when its turn has come."""
        fresh = True
        try:
            output, fresh = self._compute(step, hidden)
        except SwarmError as exc:
            output = asyncio.get_running_loop().create_future()
            output.set_exception(exc)
        self._outputs[output] = None
        output.add_done_callback(self._done)
        return partial(self._finish, step, output, fresh, held)

    def _compute(self, step: Step, hidden: Tensor) -> tuple[asyncio.Future[Tensor], bool]:
        """The step's output to be, and whether it is new: a repeated step is answered from memory."""
        self._check_chain(step.chain)
        whole = step.chain or step.reply == "all" or (step.reply == "none" and step.journal == "servers")
        reply: Literal["all", "last"] = "all" if whole else "last"
        if not step.replay:
            earlier = self._ledger.repeated(step)
            if earlier is not None and (earlier.reply, earlier.codec) == (reply, step.codec):
                self._counters["steps_repeated"] += 1
                return asyncio.shield(earlier.output), False
        output = self._engine.step(
            self.session,
            step.starts,
            step.lengths,
            hidden,
            reply=reply,
            codec=step.codec,
            timeout=step.deadline,
            sources=step.sources,
        )
        self._counters["steps_computed"] += 1
        if not step.replay:
            self._ledger.remember(step, _Answer(reply, step.codec, output))
            output.add_done_callback(partial(self._settled, step))
        return output, True

    def _check_chain(self, chain: Sequence[Hop]) -> None:
        """Every stage goes on where the one before ends: no step walks in circles."""
        end = self.span.end
        for hop in chain:
            if not end == hop.start < hop.end <= self._engine.executor.model.blocks:
                raise InvalidStepError(f"a chain with blocks {hop.start}:{hop.end} after block {end}")
            end = hop.end

    def _settled(self, step: Step, output: asyncio.Future[Tensor]) -> None:
        if output.cancelled() or output.exception() is not None:
            self._ledger.forget(step)
        if not self._closed:
            self._answers_held.resize(sum(answer.nbytes for answer in self._ledger.answers))

    def _drop_answers(self) -> None:
        self._counters["answers_dropped"] += 1
        self._ledger.drop_answers(lambda answer: answer.nbytes > 0)

    def _done(self, output: asyncio.Future[Tensor]) -> None:
        self._outputs.pop(output, None)
        if not output.cancelled():
            output.exception()  # seen, also when the session ends before anyone awaits it

    async def _work(self) -> None:
        if self._leaving is not None:
            await self._client.send(Draining(self._leaving))
        while True:
            job = await self._jobs.get()
            try:
                await job()
            except Exception:
                logger.exception("session %s failed unexpectedly", self.session[:8])
            finally:
                self._under_way -= 1
                self._room.release()

    async def _finish(
        self, step: Step, output: asyncio.Future[Tensor], fresh: bool, held: Reservation | None
    ) -> None:
        try:
            hidden = await output
            await self._deliver(step, hidden)
            if fresh and step.journal == "servers" and hidden.shape[0] == sum(step.lengths):
                self._kept_outputs.keep(step, hidden)
        except SwarmError as exc:
            await self._report(step.step, exc, step.attempt)
        except Exception:
            logger.exception("session %s: step %d failed unexpectedly", self.session[:8], step.step)
            await self._report(
                step.step, InternalError("the server failed on this step; its log says why"), step.attempt
            )
        finally:
            self._arrivals.let_go(held)

    async def _deliver(self, step: Step, output: Tensor) -> None:
        """Send an output where it has to go, and only then tell the client of it."""
        undelivered = ""
        if step.chain:
            try:
                await self._next.push(step.chain[0], attrs.evolve(step, chain=step.chain[1:]), output)
            except SwarmError as exc:
                # Not why: what answers where is none of a client's business.
                logger.debug("session %s: step %d was not pushed: %s", self.session[:8], step.step, exc)
                undelivered = "the next stage was not reached"
            else:
                if step.journal != "off":
                    copy = (output,) if step.journal == "client" else ()
                    await self._client.copy(StepForwarded(step.step, self.span.end, step.attempt), *copy)
                return
        self._counters["steps_answered"] += 1
        answer = (output,) if step.chain or step.reply != "none" else ()
        await self._client.send(StepOutput(step.step, self.span.end, undelivered, step.attempt), *answer)

    async def _report(self, step: int, error: SwarmError, attempt: int = 0) -> None:
        self._counters["steps_refused"] += 1
        logger.info("session %s: step %d refused: %s", self.session[:8], step, error)
        await self._client.send(StepFailed(step, to_failure(error), attempt))

    # --- when stages change ------------------------------------------------------------------------------

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
            rows = await self._kept_outputs.rows(order)
            await self._next.push(order.chain[0], step, rows)
            self._counters["replays_sent"] += 1
        except SwarmError as exc:
            await self._report(order.step, exc)
