"""Memory of what is in flight for a client: steps to be computed, and copies that it has yet to read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from swarmcore.errors import InvalidStepError, ResourceLimitError
from swarmcore.resources import Reservation, Resource, ResourceManager
from swarmcore.types import PeerId
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
