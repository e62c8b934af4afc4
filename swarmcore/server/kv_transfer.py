"""The attention caches of one hosted session on their way to another server, or from one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from contextlib import aclosing

from swarmcore.engine.engine import Engine
from swarmcore.errors import InvalidStepError, SessionLostError, StreamClosedError, SwarmError
from swarmcore.rpc.channel import Channel
from swarmcore.server.arrivals import InFlightBytes
from swarmcore.server.links import ClientOutbox
from swarmcore.server.next_hops import StageDialer
from swarmcore.wire.failure import to_failure
from swarmcore.wire.messages import CachePart, KvTransferFailed, KvTransferred, TransferKv
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

CACHE_PART_NBYTES = 4 << 20
"""Most bytes of attention cache in one message of a hand-over."""

HAND_OVER_TIMEOUT = 60.0
"""Seconds for the next part of the caches of one session to get across."""


class KvTransfer:
    """Sends a session's caches, and takes in those of another server. The client is told how it went."""

    def __init__(
        self,
        session: str,
        *,
        engine: Engine,
        hops: StageDialer,
        client: ClientOutbox,
        arrivals: InFlightBytes,
        counters: Counter[str],
    ) -> None:
        self._session = session
        self._engine = engine
        self._hops = hops
        self._client = client
        self._arrivals = arrivals
        self._counters = counters

    async def send(self, order: TransferKv) -> None:
        """Send all caches to the session at ``order.hop``, which tells the client when it has them.

        The client hears from here of what goes wrong, a session that is not there too.
        """
        try:
            if order.hop.session == self._session:
                raise InvalidStepError("a session cannot be handed over to itself")
            async with asyncio.timeout(HAND_OVER_TIMEOUT) as clock:
                chunks = self._engine.export_cache(self._session, max_bytes=CACHE_PART_NBYTES)
                async with aclosing(chunks), await self._hops.join(order.hop, self._client.client) as channel:
                    async for chunk in chunks:
                        part = CachePart(chunk.sequence, chunk.start, chunk.count)
                        await channel.send(part, *chunk.tensors)
                        clock.reschedule(asyncio.get_running_loop().time() + HAND_OVER_TIMEOUT)
                    await channel.send(CachePart(0, 0, 0, last=True))
                    await _taken(channel)
            self._counters["sessions_handed_over"] += 1
        except TimeoutError:
            message = f"a part of the caches did not get across in {HAND_OVER_TIMEOUT:.0f} s"
            await self._failed(SessionLostError(message))
        except SwarmError as exc:
            await self._failed(exc)

    async def take(self, part: CachePart, tensors: tuple[Tensor, ...]) -> None:
        """Take in a part of another server's caches."""
        try:
            if part.count:
                async with self._arrivals.held(tensors):
                    await self._engine.import_cache(
                        self._session,
                        part.sequence,
                        part.start,
                        part.count,
                        tensors,
                        timeout=HAND_OVER_TIMEOUT,
                    )
            if part.last:
                await self._client.send(KvTransferred(self._engine.length(self._session)))
        except SwarmError as exc:
            await self._failed(exc)

    async def _failed(self, error: SwarmError) -> None:
        logger.info("session %s: its caches do not get across: %s", self._session[:8], error)
        await self._client.send(KvTransferFailed(to_failure(error)))


async def _taken(channel: Channel) -> None:
    """Return once the other server has read everything; raise what it has against it."""
    await channel.end()
    with contextlib.suppress(StreamClosedError):
        await channel.receive()
