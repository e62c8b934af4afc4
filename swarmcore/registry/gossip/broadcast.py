"""Epidemic push: what is new goes at once to a few random peers, which do the same with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from swarmcore.errors import SwarmError
from swarmcore.registry.gossip.members import Partner, Partners
from swarmcore.registry.gossip.messages import EXCHANGE, ExchangeRecords, records_per_message
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.suspicion import Suspected
from swarmcore.rpc import Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import PeerId, short

logger = logging.getLogger(__name__)

LINGER = 0.02
"""Seconds in which records gather before they are sent together."""
BUSY_LINGER = 0.2
"""The same when the last push was less than `BUSY` seconds ago: where much happens, much goes together."""
BUSY = 1.0
REFRESH_LINGER = 0.5
"""The same for records that can wait."""
MAX_IN_FLIGHT = 16
"""Pushes under way at once; above that, records wait, only the newest of each peer."""
ATTEMPTS = 3
"""Peers tried for one push before it is left to anti-entropy."""


class Pusher:
    """Sends each record and each suspicion it is given to some random partners, once.

    ``on_failed`` is called with every partner that could not be reached.
    """

    def __init__(
        self, node: Node, partners: Partners, options: GossipOptions, on_failed: Callable[[PeerId], None]
    ) -> None:
        self._node = node
        self._partners = partners
        self._fanout = options.fanout
        self._timeout = options.timeout
        self._on_failed = on_failed
        self._batch = records_per_message(node.limits, options.limits)
        self._outbox: dict[PeerId, SignedRecord] = {}
        self._suspected: dict[PeerId, Suspected] = {}
        self._wake = asyncio.Event()
        self._refresh: asyncio.TimerHandle | None = None
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._tasks = BackgroundTasks()

    def add(self, owner: PeerId, record: SignedRecord, *, urgent: bool = True) -> None:
        """Send ``record`` soon; it takes the place of one of the same owner that still waits."""
        self._outbox[owner] = record
        if urgent:
            self._wake.set()
        elif self._refresh is None:
            self._refresh = asyncio.get_running_loop().call_later(REFRESH_LINGER, self._wake.set)

    def add_suspicion(self, suspected: Suspected) -> None:
        """Send ``suspected`` soon; only one about the same peer waits."""
        self._suspected[suspected.peer] = suspected
        self._wake.set()

    async def run(self) -> None:
        """Send what is added until cancelled."""
        now = asyncio.get_running_loop().time
        pushed = -BUSY
        try:
            while True:
                await self._wake.wait()
                await asyncio.sleep(BUSY_LINGER if now() < pushed + BUSY else LINGER)
                pushed = now()
                news = self._take()
                for partner in self._partners.choose(self._fanout, asyncio.get_running_loop().time()):
                    await self._slots.acquire()
                    self._tasks.start(self._push_and_release(news, partner), "registry push")
        finally:
            self._stop_refresh()
            await self._tasks.close()

    async def push_now(self, record: SignedRecord) -> None:
        """Send one record past the queue and wait until it has arrived, or failed, everywhere."""
        chosen = self._partners.choose(self._fanout, asyncio.get_running_loop().time())
        news = ExchangeRecords((record,), spread=True)
        await asyncio.gather(*(self._push(news, partner, chosen) for partner in chosen))

    def _take(self) -> ExchangeRecords:
        suspects = list(self._suspected)[: self._batch]
        owners = list(self._outbox)[: self._batch - len(suspects)]
        if len(owners) == len(self._outbox) and len(suspects) == len(self._suspected):
            self._wake.clear()
            self._stop_refresh()
        return ExchangeRecords(
            records=tuple(self._outbox.pop(owner) for owner in owners),
            spread=True,
            suspected=tuple(self._suspected.pop(peer) for peer in suspects),
        )

    def _stop_refresh(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            self._refresh = None

    async def _push_and_release(self, news: ExchangeRecords, partner: Partner) -> None:
        try:
            await self._push(news, partner)
        finally:
            self._slots.release()

    async def _push(self, news: ExchangeRecords, partner: Partner, others: Collection[Partner] = ()) -> None:
        tried = {other.peer for other in others}
        now = asyncio.get_running_loop().time
        for _ in range(ATTEMPTS):
            tried.add(partner.peer)
            try:
                await self._node.call(partner.addresses, EXCHANGE, news, timeout=self._timeout)
            except SwarmError as exc:
                logger.debug("could not push to %s: %s", short(partner.peer), exc)
                self._partners.failed(partner.peer, now())
                self._on_failed(partner.peer)
            else:
                self._partners.answered(partner.peer)
                return
            replacements = self._partners.choose(1, now(), exclude=tried)
            if not replacements:
                return
            partner = replacements[0]
