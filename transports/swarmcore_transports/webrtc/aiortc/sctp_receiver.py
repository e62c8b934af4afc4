"""The receiving half of our SCTP: when it acknowledges, how it puts messages together, what it holds.

RFC 9260, 6.2 (https://www.rfc-editor.org/rfc/rfc9260) asks for an acknowledgement of every second packet at
least, within 200 ms, and at once where something is missing. Each one is a DTLS record: as much work for both
sides as a packet of data. aiortc sends one for every packet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from aiortc import rtcsctptransport
from aiortc.rtcsctptransport import DataChunk, InboundStream, RTCSctpTransport
from OpenSSL import SSL

logger = logging.getLogger(__name__)

ACK_DELAY = 0.02
"""Seconds for which a packet may wait for the next, so that both are acknowledged at once. A tenth of what is
allowed: the peer's loss probe waits as long on top of a round trip."""

_MAX_TO_SACK = 8
"""Packets that one acknowledgement is for when they come together; every second when they come one by one."""

_FIRST_PACKETS = 128
"""Packets of which every second is acknowledged in any case: a sender in slow start opens its window by the
acknowledgements it gets (RFC 9260, 7.2.1)."""

TSN_MODULO = 2**32
_MAX_DUPLICATES = 256
_MAX_MISORDERED = 2048
_MAX_FRAGMENTS = 4096
_LAST_FRAGMENT = 0x01


def at_or_after(one: int, other: int) -> bool:
    """Of two TSNs, which wrap around."""
    return (one - other) % TSN_MODULO < TSN_MODULO // 2


class _InboundStream(InboundStream):
    """Looks for whole messages only where one may have become whole: not at each of their packets."""

    def __init__(self) -> None:
        super().__init__()
        self._ends = 0

    def add_chunk(self, chunk: DataChunk) -> None:
        super().add_chunk(chunk)
        self._ends += chunk.flags & _LAST_FRAGMENT

    def pop_messages(self) -> Iterator[tuple[int, int, bytes]]:
        if self._ends:
            for message in super().pop_messages():
                self._ends -= 1
                yield message

    def prune_chunks(self, tsn: int) -> int:
        pruned = super().prune_chunks(tsn)
        self._ends = sum(chunk.flags & _LAST_FRAGMENT for chunk in self.reassembly)
        return pruned


class DelayedSackReceiver(RTCSctpTransport):
    """Acknowledges every second packet, and at once the end of a message and what tells of a loss."""

    def __init__(self, transport: Any, port: int = 5000) -> None:
        super().__init__(transport, port)
        self._clock = asyncio.get_running_loop()
        self._sack_at_once = False
        self._packets_to_sack = 0
        self._packets_taken = 0
        self._sack_soon = False
        self._sack_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _t3_cancel(self) -> None:
        """Called when the association ends."""
        super()._t3_cancel()
        if self._sack_timer is not None:
            self._sack_timer.cancel()
            self._sack_timer = None

    async def _receive_data_chunk(self, chunk: DataChunk) -> None:
        assert self._last_received_tsn is not None
        expected = chunk.tsn == (self._last_received_tsn + 1) % TSN_MODULO
        if not expected and (self._advertised_rwnd <= 0 or len(self._sack_misordered) >= _MAX_MISORDERED):
            self._sack_needed = self._sack_at_once = True
            # Beyond the window: dropped (RFC 9260, 6.2), and sent again once there is room. What comes in its
            # turn is taken all the same: only that can complete a message and make room.
            return
        if self._advertised_rwnd < -rtcsctptransport.LOCAL_MAX_MESSAGE_SIZE or (
            len(self._get_inbound_stream(chunk.stream_id).reassembly) >= _MAX_MISORDERED + _MAX_FRAGMENTS
        ):
            logger.warning("a peer's message never ended: its data channels are closed")
            await self._abort()
            self._set_state(self.State.CLOSED)
            return
        # A gap, and what fills one, are told at once (RFC 9260, 6.7). So is the end of a message: its sender
        # often has nothing more to send, and would take the silence for a lost tail.
        if not expected or self._sack_misordered or chunk.flags & _LAST_FRAGMENT:
            self._sack_at_once = True
        await super()._receive_data_chunk(chunk)

    def _get_inbound_stream(self, stream_id: int) -> InboundStream:
        if stream_id not in self._inbound_streams:
            self._inbound_streams[stream_id] = _InboundStream()
        return self._inbound_streams[stream_id]

    def _mark_received(self, tsn: int) -> bool:
        """As the base does, in a time that does not grow with what is missing."""
        assert self._last_received_tsn is not None
        following = (self._last_received_tsn + 1) % TSN_MODULO
        if not at_or_after(tsn, following) or tsn in self._sack_misordered:
            self._sack_duplicates.append(tsn)
            return True
        if tsn != following:
            self._sack_misordered.add(tsn)
            return False
        while True:
            self._last_received_tsn = following
            following = (following + 1) % TSN_MODULO
            if following not in self._sack_misordered:
                return False
            self._sack_misordered.remove(following)

    async def _send_sack(self) -> None:
        """Called for every packet with data. Those that came together, read from the socket in one go, are
        acknowledged together: once the event loop gets on to something else."""
        self._packets_to_sack += 1
        self._packets_taken += 1
        self._sack_needed = False
        if self._packets_to_sack >= (2 if self._packets_taken < _FIRST_PACKETS else _MAX_TO_SACK):
            await self._send_sack_now()
        elif self._packets_to_sack >= 2 or self._sack_at_once:
            if not self._sack_soon:
                self._sack_soon = True
                self._clock.call_soon(self._batch_ended)
        elif self._sack_timer is None:
            self._sack_timer = self._clock.call_later(ACK_DELAY, self._sack_delayed)

    def _batch_ended(self) -> None:
        """What had come together has been taken: the event loop has got on to something else."""
        self._sack_soon = False
        self._sack_waiting()

    async def _send_sack_now(self) -> None:
        self._packets_to_sack = 0
        self._sack_at_once = False
        del self._sack_duplicates[_MAX_DUPLICATES:]
        await super()._send_sack()

    def _sack_delayed(self) -> None:
        self._sack_timer = None
        self._sack_waiting()

    def _sack_waiting(self) -> None:
        if self._packets_to_sack and self._association_state is not self.State.CLOSED:
            self._send_soon(self._send_sack_now)

    async def _send_chunk(self, chunk: Any) -> None:
        try:
            await super()._send_chunk(chunk)
        except SSL.Error as exc:  # while DTLS is being closed, which aiortc's state does not show yet
            raise ConnectionError("DTLS is closed") from exc

    def _send_soon(self, send: Callable[[], Any]) -> None:
        async def guarded() -> None:
            with contextlib.suppress(ConnectionError):  # DTLS is closed: nothing is sent any more
                await send()

        task = self._clock.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
