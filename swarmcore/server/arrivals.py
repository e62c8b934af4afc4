"""What waits in a session, to be computed or to be read by its client, counted for that client."""

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
        self._held: set[Reservation] = set()

    async def hold(self, tensors: Iterable[Tensor], seconds: float = TIMEOUT) -> Reservation | None:
        """Wait until there is room for them; None when they are too small to be counted.

        Raise `InvalidStepError` for what could never be here at a time, `DeadlineExceededError` when no room
        came in ``seconds``.
        """
        nbytes = sum(max(tensor.decoded_nbytes, tensor.data.nbytes) for tensor in tensors)
        if nbytes < UNCOUNTED_NBYTES:
            return None
        patience = min(seconds, TIMEOUT) if seconds > 0 else 0.0
        deadline = asyncio.get_running_loop().time() + patience
        try:
            held = await self._resources.acquire(self._client, Resource.BYTES, nbytes, deadline=deadline)
        except ResourceLimitError as exc:
            raise InvalidStepError(f"{exc.message}: send a long step in several") from exc
        self._held.add(held)
        return held

    def let_go(self, held: Reservation | None) -> None:
        """What `hold` gave is no longer here."""
        if held is not None:
            held.release()
            self._held.discard(held)

    def close(self) -> None:
        """Nothing is here any more."""
        while self._held:
            self._held.pop().release()

    @asynccontextmanager
    async def held(self, tensors: Iterable[Tensor]) -> AsyncIterator[None]:
        """As `hold`, until the end of the context."""
        reservation = await self.hold(tensors)
        try:
            yield
        finally:
            self.let_go(reservation)
