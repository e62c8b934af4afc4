"""A stage's way to the stage that follows it in a session's chain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

from swarmcore.errors import DeadlineExceededError, SwarmError
from swarmcore.rpc.channel import Channel
from swarmcore.server.next_hops import NextHops
from swarmcore.types import PeerId, short
from swarmcore.wire.messages import CachePart, Hop, Step
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

PUSH_TIMEOUT = 20.0
"""Seconds in which the next server has to take in one step, or else to show that it lives: it may be at work
on those before."""


class NextStage:
    """Pushes steps to whichever stage is next, dialled when it is first needed and when it has changed."""

    def __init__(self, hops: NextHops, client: PeerId, counters: Counter[str]) -> None:
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
