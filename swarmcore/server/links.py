"""What a hosted session sends to its client: answers at once, copies for the journal when there is time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from typing import Any

from swarmcore.errors import DeadlineExceededError, SwarmError, UnavailableError
from swarmcore.resources import Reservation
from swarmcore.rpc.channel import Channel
from swarmcore.server.arrivals import InFlightBytes
from swarmcore.server.next_hops import StageDialer
from swarmcore.types import PeerId, short
from swarmcore.wire.messages import CachePart, Hop, Step, StepForwarded
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

MAX_COPIES_NBYTES = 16 << 20
"""Bytes of copies that wait for a slow client before its session waits for them."""


class ClientOutbox:
    """A client's channel, shared by the session's answers and its copies; see `Channel.send`.

    That the client is gone is nobody's error here: the reader of its channel sees it, and closes the session.
    """

    def __init__(self, channel: Channel, arrivals: InFlightBytes) -> None:
        """Copies that wait are counted in ``arrivals``."""
        self._channel = channel
        self._arrivals = arrivals
        self._turn = asyncio.Lock()
        self._copies: deque[tuple[StepForwarded, tuple[Tensor, ...], Reservation | None]] = deque()
        self._copies_nbytes = 0
        self._changed = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    @property
    def client(self) -> PeerId:
        return self._channel.remote

    async def send(self, record: Any, *tensors: Tensor) -> None:
        """Send an answer; it may overtake copies that wait."""
        try:
            async with self._turn:
                await self._channel.send(record, *tensors)
        except UnavailableError as exc:
            logger.debug("the client is gone: %s", exc)

    async def copy(self, record: StepForwarded, *tensors: Tensor) -> None:
        """Send later, in the order of the calls; wait only when too much waits already."""
        while self._copies and self._copies_nbytes >= MAX_COPIES_NBYTES:
            self._changed.clear()
            await self._changed.wait()
        held = await self._arrivals.hold(tensors)
        self._copies.append((record, tensors, held))
        self._copies_nbytes += sum(tensor.data.nbytes for tensor in tensors)
        self._changed.set()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_copies(), name="journal copies")

    async def close(self) -> None:
        """Stop sending; the channel is closed by its own handler."""
        self._copies.clear()
        self._copies_nbytes = 0
        self._changed.set()
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_copies(self) -> None:
        while True:
            while not self._copies:
                self._changed.clear()
                await self._changed.wait()
            record, tensors, held = self._copies.popleft()
            await self.send(record, *tensors)
            self._arrivals.let_go(held)
            self._copies_nbytes -= sum(tensor.data.nbytes for tensor in tensors)
            self._changed.set()


PUSH_TIMEOUT = 20.0
"""Seconds in which the next server has to take in one step, or else to show that it lives: it may be at work
on those before."""


class Downstream:
    """Pushes steps to whichever stage is next, dialled when it is first needed and when it has changed."""

    def __init__(self, hops: StageDialer, client: PeerId, counters: Counter[str]) -> None:
        """``client`` is the one on whose behalf."""
        self._hops = hops
        self._client = client
        self._counters = counters
        self._channel: Channel | None = None
        self._session = ""
        self._watch: asyncio.Task[None] | None = None

    async def dial(self, hop: Hop) -> None:
        """Connect ahead of the first push. Raise `UnavailableError` when ``hop`` cannot be reached."""
        await self._channel_to(hop)

    async def push(self, hop: Hop, record: Step | CachePart, tensor: Tensor) -> None:
        """Send to ``hop``. Raise `UnavailableError` or `DeadlineExceededError` when it cannot be done."""
        channel = await self._channel_to(hop)
        try:
            async with asyncio.timeout(PUSH_TIMEOUT) as clock:
                watch = asyncio.create_task(self._prolong(clock, hop), name="session push watch")
                try:
                    await channel.send(record, tensor)
                finally:
                    watch.cancel()
        except TimeoutError as exc:
            # Part of the message may be on its way: nothing can follow it.
            channel.abort("the stage took too long to take in a step")
            raise DeadlineExceededError(
                f"{short(hop.peer)} did not take in a step within {PUSH_TIMEOUT:.0f} s"
            ) from exc
        self._counters["steps_pushed"] += 1

    def give_up_unless(self, hop: Hop | None) -> None:
        """Drop a push that hangs when the chain goes on elsewhere: the client knows of a failure by now."""
        if self._channel is not None and hop is not None and hop.session != self._session:
            self._channel.abort("the session goes on elsewhere")

    async def _prolong(self, clock: asyncio.Timeout, hop: Hop) -> None:
        """Give the next server more time whenever it shows that it lives."""
        while True:
            await asyncio.sleep(PUSH_TIMEOUT / 2)
            try:
                await self._hops.ask_for_life(hop, least=PUSH_TIMEOUT / 10)
            except SwarmError as exc:
                if exc.origin is None:
                    continue
            with contextlib.suppress(RuntimeError):  # it is too late
                clock.reschedule(asyncio.get_running_loop().time() + PUSH_TIMEOUT)

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        if channel is not None:
            await channel.close()

    async def _channel_to(self, hop: Hop) -> Channel:
        if self._channel is not None and self._session == hop.session:
            if self._watch is not None and not self._watch.done():
                return self._channel
            self._counters["pushes_redialled"] += 1
        await self.close()
        channel = await self._hops.join(hop, self._client)
        self._channel, self._session = channel, hop.session
        self._watch = asyncio.create_task(self._wait_for_end(channel))
        return channel

    async def _wait_for_end(self, channel: Channel) -> None:
        """The next stage never answers on this channel: whatever ends the wait means that it is gone."""
        try:
            await channel.receive()
        except SwarmError as exc:
            logger.debug("next stage %s is gone: %s", short(channel.remote), exc)
