"""Epidemic push: what is new goes at once to a few random peers, which do the same with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from swarmcore.errors import SwarmError
from swarmcore.registry.background import BackgroundTasks
from swarmcore.registry.messages import EXCHANGE, ExchangeRecords, records_per_message
from swarmcore.registry.partners import Partner, Partners
from swarmcore.registry.records import RecordLimits, SignedRecord
from swarmcore.registry.store import Accepted
from swarmcore.rpc import Node
from swarmcore.types import PeerId, short

logger = logging.getLogger(__name__)

LINGER = 0.02
"""Seconds in which records gather before they are sent together."""
REFRESH_LINGER = 0.5
"""The same for records that change nothing but their expiry: most records are, and they can wait."""
MAX_IN_FLIGHT = 16
"""Pushes under way at once; above that, records wait, only the newest of each peer."""
ATTEMPTS = 3
"""Peers tried for one push before it is left to anti-entropy."""


class Pusher:
    """Sends each record it is given to ``fanout`` random partners, once."""

    def __init__(
        self, node: Node, partners: Partners, limits: RecordLimits, *, fanout: int, timeout: float
    ) -> None:
        self._node = node
        self._partners = partners
        self._fanout = fanout
        self._timeout = timeout
        self._batch = records_per_message(node.limits, limits)
        self._outbox: dict[PeerId, SignedRecord] = {}
        self._wake = asyncio.Event()
        self._refresh: asyncio.TimerHandle | None = None
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._tasks = BackgroundTasks()

    def add(self, record: SignedRecord, accepted: Accepted) -> None:
        """Send ``record`` soon; it takes the place of one of the same owner that still waits."""
        self._outbox[accepted.announcement.peer] = record
        if accepted.change is not None:
            self._wake.set()
        elif self._refresh is None:
            self._refresh = asyncio.get_running_loop().call_later(REFRESH_LINGER, self._wake.set)

    async def run(self) -> None:
        """Send what is added until cancelled."""
        try:
            while True:
                await self._wake.wait()
                await asyncio.sleep(LINGER)
                records = self._take()
                for partner in self._partners.choose(self._fanout, asyncio.get_running_loop().time()):
                    await self._slots.acquire()
                    self._tasks.start(self._push_and_release(records, partner), "registry push")
        finally:
            self._stop_refresh()
            await self._tasks.close()

    async def push_now(self, record: SignedRecord) -> None:
        """Send one record past the queue and wait until it has arrived, or failed, everywhere."""
        chosen = self._partners.choose(self._fanout, asyncio.get_running_loop().time())
        await asyncio.gather(*(self._push((record,), partner, chosen) for partner in chosen))

    def _take(self) -> tuple[SignedRecord, ...]:
        owners = list(self._outbox)[: self._batch]
        if len(owners) == len(self._outbox):
            self._wake.clear()
            self._stop_refresh()
        return tuple(self._outbox.pop(owner) for owner in owners)

    def _stop_refresh(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None

    async def _push_and_release(self, records: tuple[SignedRecord, ...], partner: Partner) -> None:
        try:
            await self._push(records, partner)
        finally:
            self._slots.release()

    async def _push(
        self, records: tuple[SignedRecord, ...], partner: Partner, others: Collection[Partner] = ()
    ) -> None:
        tried = {other.peer for other in others}
        now = asyncio.get_running_loop().time
        for _ in range(ATTEMPTS):
            tried.add(partner.peer)
            request = ExchangeRecords(records, spread=True)
            try:
                await self._node.call(partner.addresses, EXCHANGE, request, timeout=self._timeout)
            except SwarmError as exc:
                logger.debug("could not push to %s: %s", short(partner.peer), exc)
                self._partners.failed(partner.peer, now())
            else:
                self._partners.answered(partner.peer)
                return
            replacements = self._partners.choose(1, now(), exclude=tried)
            if not replacements:
                return
            partner = replacements[0]
