"""What a session sends to its client: answers at once, copies for the journal when there is time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from swarmcore.errors import UnavailableError
from swarmcore.resources import Reservation
from swarmcore.rpc.channel import Channel
from swarmcore.server.in_flight import InFlightBytes
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import PeerId
from swarmcore.wire.messages import StepForwarded
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

MAX_COPIES_NBYTES = 16 << 20
"""Bytes of copies that wait for a slow client before its session waits for them."""


class ClientOutbox:
    """A client's channel, shared by the session's answers and its copies; see `Channel.send`.

    That the client is gone is nobody's error here: the reader of its channel sees it, and closes the session.
    """

    def __init__(self, channel: Channel, in_flight: InFlightBytes) -> None:
        """Copies that wait are counted in ``in_flight``."""
        self._channel = channel
        self._in_flight = in_flight
        self._sending = asyncio.Lock()
        self._copies: deque[tuple[StepForwarded, tuple[Tensor, ...], Reservation | None]] = deque()
        self._copies_nbytes = 0
        self._changed = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    @property
    def peer(self) -> PeerId:
        return self._channel.remote

    async def send(self, record: Any, *tensors: Tensor) -> None:
        """Send an answer; it may overtake copies that wait."""
        try:
            async with self._sending:
                await self._channel.send(record, *tensors)
        except UnavailableError as exc:
            logger.debug("the client is gone: %s", exc)

    async def copy(self, record: StepForwarded, *tensors: Tensor) -> None:
        """Send later, in the order of the calls; wait only when too much waits already."""
        while self._copies and self._copies_nbytes >= MAX_COPIES_NBYTES:
            self._changed.clear()
            await self._changed.wait()
        reserved = await self._in_flight.acquire(tensors)
        self._copies.append((record, tensors, reserved))
        self._copies_nbytes += sum(tensor.data.nbytes for tensor in tensors)
        self._changed.set()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_copies(), name="journal copies")

    async def close(self) -> None:
        """Stop sending; the channel is closed by its own handler."""
        self._copies.clear()
        self._copies_nbytes = 0
        self._changed.set()
        await cancel_and_wait(self._sender)

    async def _send_copies(self) -> None:
        while True:
            while not self._copies:
                self._changed.clear()
                await self._changed.wait()
            record, tensors, reserved = self._copies.popleft()
            await self.send(record, *tensors)
            self._in_flight.release(reserved)
            self._copies_nbytes -= sum(tensor.data.nbytes for tensor in tensors)
            self._changed.set()
