"""One session on a server: runs its steps in order and sends each output straight to the next stage."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from functools import partial
from typing import Literal

import attrs

from swarmcore.errors import InternalError, SessionLostError, SwarmError, UnavailableError
from swarmcore.executor.engine import Engine
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.protocols import INFERENCE_PROTOCOL
from swarmcore.session.ledger import StepLedger
from swarmcore.types import Address, Span, short
from swarmcore.wire.failure import to_failure
from swarmcore.wire.framing import Message
from swarmcore.wire.messages import Hop, JoinSession, Step, StepFailed, StepOutput
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 4
"""Steps of one session that a server takes in before it stops reading; enough to overlap prefill chunks."""

DIAL_TIMEOUT = 5.0
"""Seconds to reach the next server of a chain before the client is asked to carry the hop."""


@attrs.frozen
class _Answer:
    """What a step comes to, and in which form it was asked for."""

    reply: Literal["all", "last"]
    codec: str
    output: asyncio.Future[Tensor]


class HostedSession:
    """A client's session on this server; lives as long as the client's channel.

    Steps come in by `accept`, from the client or from the stage before; from `start` on one task sends their
    outputs out again, in order.
    """

    def __init__(
        self, session: str, span: Span, *, engine: Engine, node: Node, client: Channel, counters: Counter[str]
    ) -> None:
        self.session = session
        self.span = span
        self._engine = engine
        self._node = node
        self._client = client
        self._counters = counters
        self._ledger: StepLedger[_Answer] = StepLedger(depth=MAX_STEPS_IN_FLIGHT + 1)
        self._room = asyncio.Semaphore(MAX_STEPS_IN_FLIGHT)
        self._in_flight: asyncio.Queue[tuple[Step, asyncio.Future[Tensor]]] = asyncio.Queue()
        self._closed = False
        self._sender: asyncio.Task[None] | None = None
        self._next: Channel | None = None
        self._next_session = ""
        self._next_watch: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return (
            f"<HostedSession {self.session[:8]} [{self.span}] of {short(self._client.remote)} · "
            f"{self._in_flight.qsize()} steps in flight>"
        )

    def start(self) -> None:
        """Begin to send outputs; steps are taken in before that, as many as there is room for."""
        self._sender = asyncio.create_task(self._send_outputs(), name="session outputs")

    async def accept(self, message: Message) -> None:
        """Put a step in line; wait while too many are in flight. Its output, or why it failed, is sent.

        Raise `SessionLostError` when the session is closed.
        """
        await self._room.acquire()
        if self._closed:
            self._room.release()  # for the next one that waits
            raise SessionLostError(f"session {self.session[:8]} was closed")
        step: Step = message.record
        try:
            output = self._output(step, message.tensor("hidden"))
        except SwarmError as exc:
            output = asyncio.get_running_loop().create_future()
            output.set_exception(exc)
        self._in_flight.put_nowait((step, output))

    async def dial(self, hop: Hop) -> bool:
        """Connect to the stage that will follow, before `start`; False when it cannot be reached."""
        try:
            await self._channel_to(hop)
        except SwarmError as exc:
            logger.info("session %s: cannot reach %s: %s", self.session[:8], short(hop.peer), exc)
            return False
        return True

    async def close(self) -> None:
        """Cancel what is in flight and free the session's cache."""
        self._closed = True
        self._room.release()
        while not self._in_flight.empty():
            self._in_flight.get_nowait()[1].cancel()
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
        self._engine.close_session(self.session)
        await self._drop_next()

    def _output(self, step: Step, hidden: Tensor) -> asyncio.Future[Tensor]:
        """Have the step computed, or answered from memory when it came before."""
        reply: Literal["all", "last"] = "last" if step.reply == "last" and not step.chain else "all"
        earlier = self._ledger.repeated(step)
        if earlier is not None and (earlier.reply, earlier.codec) == (reply, step.codec):
            self._counters["steps_repeated"] += 1
            return asyncio.shield(earlier.output)
        output = self._engine.step(
            self.session,
            step.starts,
            step.lengths,
            hidden,
            reply=reply,
            codec=step.codec,
            timeout=step.deadline,
        )
        self._counters["steps_computed"] += 1
        self._ledger.remember(step, _Answer(reply, step.codec, output))
        output.add_done_callback(partial(self._settled, step))
        return output

    def _settled(self, step: Step, output: asyncio.Future[Tensor]) -> None:
        if output.cancelled() or output.exception() is not None:
            self._ledger.forget(step)

    async def _send_outputs(self) -> None:
        while True:
            step, output = await self._in_flight.get()
            try:
                await self._deliver(step, await output)
            except SwarmError as exc:
                await self._report(step, exc)
            except Exception:
                logger.exception("session %s: step %d failed unexpectedly", self.session[:8], step.step)
                await self._report(step, InternalError("the server failed on this step; its log says why"))
            finally:
                self._room.release()

    async def _deliver(self, step: Step, output: Tensor) -> None:
        undelivered = ""
        if step.chain:
            try:
                await self._push(step, output)
            except SwarmError as exc:
                undelivered = exc.message
            else:
                return
        self._counters["steps_answered"] += 1
        await self._to_client(StepOutput(step.step, self.span.end, undelivered), output)

    async def _push(self, step: Step, output: Tensor) -> None:
        channel = await self._channel_to(step.chain[0])
        await channel.send(attrs.evolve(step, chain=step.chain[1:]), output)
        self._counters["steps_pushed"] += 1

    async def _report(self, step: Step, error: SwarmError) -> None:
        self._counters["steps_refused"] += 1
        logger.info("session %s: step %d refused: %s", self.session[:8], step.step, error)
        await self._to_client(StepFailed(step.step, to_failure(error)))

    async def _to_client(self, record: StepOutput | StepFailed, *tensors: Tensor) -> None:
        try:
            await self._client.send(record, *tensors)
        except UnavailableError as exc:
            # The reader of the client's channel sees the same and closes the session.
            logger.debug("session %s: client is gone: %s", self.session[:8], exc)

    async def _channel_to(self, hop: Hop) -> Channel:
        """The channel to the next stage, dialled anew when the chain or the connection has changed."""
        if self._next is not None and self._next_session == hop.session:
            if self._next_watch is not None and not self._next_watch.done():
                return self._next
            self._counters["pushes_redialled"] += 1
        await self._drop_next()
        addresses = [Address.parse(url) for url in hop.addresses]
        channel = await self._node.open(
            addresses, INFERENCE_PROTOCOL, JoinSession(hop.session), timeout=DIAL_TIMEOUT
        )
        self._next, self._next_session = channel, hop.session
        self._next_watch = asyncio.create_task(self._watch(channel))
        return channel

    async def _watch(self, channel: Channel) -> None:
        """The next stage never answers on this channel: whatever ends the wait means that it is gone."""
        try:
            await channel.receive()
        except SwarmError as exc:
            logger.debug("session %s: next stage is gone: %s", self.session[:8], exc)

    async def _drop_next(self) -> None:
        channel, self._next = self._next, None
        if self._next_watch is not None:
            self._next_watch.cancel()
            await asyncio.gather(self._next_watch, return_exceptions=True)
            self._next_watch = None
        if channel is not None:
            await channel.close()
