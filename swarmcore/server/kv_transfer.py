"""The KV caches of one session on their way to another server, or from one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from contextlib import aclosing

import attrs

from swarmcore.engine.engine import Engine
from swarmcore.errors import InvalidStepError, SessionLostError, StreamClosedError, SwarmError
from swarmcore.server.client_outbox import ClientOutbox, InFlightBytes
from swarmcore.server.downstream import StageDialer
from swarmcore.tasks import deadline_after
from swarmcore.wire.failure import to_failure
from swarmcore.wire.messages import CachePart, KvTransferFailed, KvTransferred, TransferKv
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

PART_NBYTES = 4 << 20
"""Most bytes of attention cache in one message of a transfer."""

PART_TIMEOUT = 60.0
"""Seconds for the next part of the caches of one session to get across."""


@attrs.frozen(kw_only=True, eq=False)
class KvTransfer:
    """Sends a session's caches, and takes in those of another server. The client is told how it went."""

    _session: str
    _engine: Engine
    _dialer: StageDialer
    _client: ClientOutbox
    _in_flight: InFlightBytes
    _counters: Counter[str]

    async def send(self, order: TransferKv) -> None:
        """Send all caches to the session at ``order.hop``, which tells the client when it has them.

        The client hears from here of what goes wrong, a session that is not there too.
        """
        try:
            if order.hop.session == self._session:
                raise InvalidStepError("the caches of a session cannot be transferred to that session itself")
            async with deadline_after(PART_TIMEOUT, _too_slow) as clock:
                chunks = self._engine.export_cache(self._session, max_bytes=PART_NBYTES)
                connecting = self._dialer.connect(order.hop, self._client.peer)
                async with aclosing(chunks), await connecting as channel:
                    async for chunk in chunks:
                        part = CachePart(chunk.sequence, chunk.start, chunk.count)
                        await channel.send(part, *chunk.tensors)
                        clock.reschedule(asyncio.get_running_loop().time() + PART_TIMEOUT)
                    await channel.send(CachePart(0, 0, 0, last=True))
                    await channel.end()
                    with contextlib.suppress(StreamClosedError):  # the other server has read everything
                        await channel.receive()
            self._counters["sessions_handed_over"] += 1
        except SwarmError as exc:
            await self._failed(exc)

    async def receive(self, part: CachePart, tensors: tuple[Tensor, ...]) -> None:
        """Take in a part of another server's caches."""
        try:
            if part.count:
                async with self._in_flight.reserved(tensors):
                    await self._engine.import_cache(
                        self._session, part.sequence, part.start, part.count, tensors, timeout=PART_TIMEOUT
                    )
            if part.last:
                await self._client.send(KvTransferred(self._engine.length(self._session)))
        except SwarmError as exc:
            await self._failed(exc)

    async def _failed(self, error: SwarmError) -> None:
        logger.info("session %s: its caches do not get across: %s", self._session[:8], error)
        await self._client.send(KvTransferFailed(to_failure(error)))


def _too_slow() -> SessionLostError:
    return SessionLostError(f"a part of the caches did not get across in {PART_TIMEOUT:.0f} s")
