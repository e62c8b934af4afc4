"""Broadcast: what is new goes at once to a few random members, which do the same with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from swarmcore.errors import SwarmError
from swarmcore.registry.gossip.members import Member, Members
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
"""The same when the last message was sent less than `BUSY` seconds ago: much goes together."""
BUSY = 1.0
REFRESH_LINGER = 0.5
"""The same for records that can wait."""
MAX_IN_FLIGHT = 16
"""Messages under way at once; above that, records wait, only the newest of each peer."""
ATTEMPTS = 3
"""Peers tried for one message before it is left to anti-entropy."""


class Broadcaster:
    """Sends each record and each suspicion it is given to some random members, once.

    ``on_failed`` is called with every member that could not be reached.
    """

    def __init__(
        self, node: Node, members: Members, options: GossipOptions, on_failed: Callable[[PeerId], None]
    ) -> None:
        self._node = node
        self._members = members
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
        sent_at = -BUSY
        try:
            while True:
                await self._wake.wait()
                await asyncio.sleep(BUSY_LINGER if now() < sent_at + BUSY else LINGER)
                sent_at = now()
                news = self._take()
                for member in self._members.choose(self._fanout, asyncio.get_running_loop().time()):
                    await self._slots.acquire()
                    self._tasks.start(self._send_and_release(news, member), "registry broadcast")
        finally:
            self._stop_refresh()
            await self._tasks.close()

    async def broadcast_now(self, record: SignedRecord) -> None:
        """Send one record past the queue and wait until it has arrived, or failed, everywhere."""
        chosen = self._members.choose(self._fanout, asyncio.get_running_loop().time())
        news = ExchangeRecords((record,), spread=True)
        await asyncio.gather(*(self._send(news, member, chosen) for member in chosen))

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

    async def _send_and_release(self, news: ExchangeRecords, member: Member) -> None:
        try:
            await self._send(news, member)
        finally:
            self._slots.release()

    async def _send(self, news: ExchangeRecords, member: Member, others: Collection[Member] = ()) -> None:
        tried = {other.peer for other in others}
        now = asyncio.get_running_loop().time
        for _ in range(ATTEMPTS):
            tried.add(member.peer)
            try:
                await self._node.call(member.addresses, EXCHANGE, news, timeout=self._timeout)
            except SwarmError as exc:
                logger.debug("could not send news to %s: %s", short(member.peer), exc)
                self._members.failed(member.peer, now())
                self._on_failed(member.peer)
            else:
                self._members.answered(member.peer)
                return
            replacements = self._members.choose(1, now(), exclude=tried)
            if not replacements:
                return
            member = replacements[0]
