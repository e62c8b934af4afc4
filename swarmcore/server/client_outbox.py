"""What a session sends to its client: answers at once, copies for the journal when there is time.

The memory of what is in flight for a client is counted: steps to be computed, and copies that it has yet to
read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from swarmcore.errors import InvalidStepError, ResourceLimitError, UnavailableError
from swarmcore.resources import Reservation, Resource, ResourceManager
from swarmcore.rpc.channel import Channel
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import PeerId
from swarmcore.wire.messages import StepForwarded
from swarmcore.wire.tensors import Tensor

UNCOUNTED_NBYTES = 2**16
"""Bytes of one message below which they are not counted: there are few enough steps in flight for these."""

TIMEOUT = 60.0
"""Most seconds for which a message waits until its client has less here."""


class InFlightBytes:
    """What waits here for one client, whoever pushed it, by what it takes once it is decoded."""

    def __init__(self, resources: ResourceManager, client: PeerId) -> None:
        self._resources = resources
        self._client = client
        self._reserved: set[Reservation] = set()

    async def acquire(self, tensors: Iterable[Tensor], seconds: float = TIMEOUT) -> Reservation | None:
        """Wait until there is room for them; None when they are too small to be counted.

        Raise `InvalidStepError` for what could never be here at a time, `DeadlineExceededError` when no room
        came in ``seconds``.
        """
        nbytes = sum(max(tensor.decoded_nbytes, tensor.data.nbytes) for tensor in tensors)
        if nbytes < UNCOUNTED_NBYTES:
            return None
        wait = min(seconds, TIMEOUT) if seconds > 0 else 0.0
        deadline = asyncio.get_running_loop().time() + wait
        try:
            reserved = await self._resources.acquire(self._client, Resource.BYTES, nbytes, deadline=deadline)
        except ResourceLimitError as exc:
            raise InvalidStepError(f"{exc.message}: send a long step in several") from exc
        self._reserved.add(reserved)
        return reserved

    def release(self, reserved: Reservation | None) -> None:
        """What `acquire` gave is no longer here."""
        if reserved is not None:
            reserved.release()
            self._reserved.discard(reserved)

    @asynccontextmanager
    async def reserved(self, tensors: Iterable[Tensor]) -> AsyncIterator[None]:
        """As `acquire`, until the end of the context."""
        reservation = await self.acquire(tensors)
        try:
            yield
        finally:
            self.release(reservation)

    def close(self) -> None:
        """Nothing is here any more."""
        while self._reserved:
            self._reserved.pop().release()


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
        self._copies: deque[tuple[StepForwarded, tuple[Tensor, ...], int, Reservation | None]] = deque()
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
        nbytes = sum(tensor.data.nbytes for tensor in tensors)
        self._copies.append((record, tensors, nbytes, reserved))
        self._copies_nbytes += nbytes
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
            record, tensors, nbytes, reserved = self._copies.popleft()
            await self.send(record, *tensors)
            self._in_flight.release(reserved)
            self._copies_nbytes -= nbytes
            self._changed.set()
