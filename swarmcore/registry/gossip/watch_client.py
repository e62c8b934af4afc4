"""A registry for clients: reads everything from one member and is pushed what changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

from swarmcore.errors import (
    InputError,
    PeerUnreachableError,
    ProtocolError,
    SwarmError,
)
from swarmcore.pacing import Backoff
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.registry.changes import ChangeReader
from swarmcore.registry.clock import SwarmClock, how_far_off
from swarmcore.registry.gossip.digest import unpack_entries
from swarmcore.registry.gossip.failure_detector import Probes
from swarmcore.registry.gossip.members import AT_ONCE, Member, Members, first_answer
from swarmcore.registry.gossip.messages import REPORT, WATCH, RecordBatch, ReportSuspect, WatchRecords
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.records import SignedRecord, issued_at
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Drop, RecordStore
from swarmcore.registry.gossip.watch_server import KEEPALIVE
from swarmcore.rpc import Channel, Node
from swarmcore.tasks import BackgroundTasks, deadline_after
from swarmcore.types import Address, PeerId, ServerInfo, short

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 10.0


class WatchingRegistry(Registry):
    """Follows the swarm without being part of it; what a client uses. Needs no address of its own.

    It holds one channel to one member at a time. When that member fails or falls silent it moves on to
    another: any bootstrap peer, and any member that it has learned of. Its view stays meanwhile, each record
    to its own expiry. Records are checked here as by a full member: the peer that is watched can hold back
    news, not invent any. A server that others suspect to be dead is called from here before it leaves the
    view, so that one to which only this client has no way is out of it as well. Parameters are those of
    `GossipRegistry`.

    Records say when they were issued. Where none holds by this machine's clock and some do by that of the
    member, that one is gone by, and a warning names the difference.
    """

    def __init__(
        self,
        node: Node,
        bootstrap: Sequence[Address],
        *,
        options: GossipOptions | None = None,
        rng: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        options = options or GossipOptions()
        self.node = node
        self._timeout = options.timeout
        self._rng = rng or Random()
        self._members = Members(node.peer, bootstrap, self._rng, backoff=1.0)
        store = RecordStore(limits=options.limits, capacity=options.capacity, allowed=node.allowed_peers)
        self._clock = SwarmClock(
            wall_clock, lambda: asyncio.get_running_loop().time(), options.limits.max_skew
        )
        self._clock_warned = False
        self._replica = Replica(store, self._members, self._clock)
        self._most_read = 2 * options.capacity
        self._channel: Channel | None = None
        self._tasks = BackgroundTasks()
        self._probes = Probes(node, self._replica, self._members, self._tasks, timeout=options.probe_timeout)

    def __repr__(self) -> str:
        watched = short(self._channel.remote) if self._channel else "nobody"
        return f"<WatchingRegistry of {watched} {self._replica.store!r}>"

    @property
    def dropped(self) -> Mapping[Drop, int]:
        """Records refused so far, by reason."""
        return self._replica.store.dropped

    async def start(self) -> None:
        """Read all records from the first bootstrap peer that answers, and follow it.

        Raise `InputError` when there are neither bootstrap nor introduced peers, `PeerUnreachableError`,
        naming what was tried, when none answers; `start` may then be called again.
        """
        candidates = self._members.candidates
        if not candidates:
            raise InputError("a client needs the address of a member of the swarm to join through")
        self._rng.shuffle(candidates)
        self._channel = await first_answer(candidates, self._watch, dispose=_abandon)
        self._tasks.start(self._follow(self._channel), "registry watch")

    async def close(self) -> None:
        self._replica.close()
        await self._tasks.close()

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._replica.store.allow_only(peers)

    def introduce(self, addresses: Sequence[Address]) -> None:
        """Peers at ``addresses`` are asked at the start, and when the member that is followed is lost."""
        self._members.introduce(addresses)

    async def announce(self, info: ServerInfo, ttl: float) -> None:
        """Raise `InputError`: only members announce."""
        raise InputError("a WatchingRegistry does not announce; a server uses GossipRegistry")

    async def withdraw(self) -> None:
        """Nothing was announced; nothing happens."""

    def view(self) -> SwarmView:
        return self._replica.store.view()

    def changes(self) -> ChangeReader:
        return self._replica.feed.reader()

    def suspect(self, peer: PeerId) -> None:
        """Call ``peer``; if it does not answer, hide it here and tell the member that is watched."""
        sequence = self._replica.store.sequence(peer)
        if sequence is not None:
            self._probes.start(peer, sequence, on_dead=self._report)

    def _report(self, peer: PeerId, sequence: int) -> None:
        self._tasks.start(self._send_report(ReportSuspect(peer, sequence)), "registry report")

    async def _send_report(self, report: ReportSuspect) -> None:
        member = self._members.live(self._channel.remote) if self._channel else None
        if member is None or member.peer == report.peer:
            return
        try:
            await self.node.call(member.addresses, REPORT, report, timeout=self._timeout)
        except SwarmError as exc:
            logger.debug("could not report %s to %s: %s", short(report.peer), short(member.peer), exc)

    async def _watch(self, member: Member) -> Channel:
        """A channel to ``member``, with all that it knows already read. Raises as `Node.call` does."""
        opening = WatchRecords(self._replica.store.hashes())
        try:
            channel = await self.node.open(member.addresses, WATCH, opening, timeout=self._timeout)
            try:
                read: list[SignedRecord] = []
                batches = 0
                while not (batch := await self._read(channel)).complete:
                    read += batch.records
                    batches += 1
                    if batches + len(read) > self._most_read:
                        raise ProtocolError(f"{short(member.peer)} tells of ever more peers")
                await self._judge_clock([*read, *batch.records], batch.clock, member.peer)
            except BaseException:
                _abandon(channel)
                raise
        except SwarmError:
            self._members.failed(member.peer, asyncio.get_running_loop().time())
            raise
        self._members.answered(member.peer)
        # A member that might leave out records altogether may be believed for as long as a check takes.
        for peer, sequence in self._replica.store.shown_among(unpack_entries(batch.suspected)):
            self._replica.hide(peer, sequence)
        self._probes.recheck()
        return channel

    async def _read(self, channel: Channel) -> RecordBatch:
        """Take the records of the next batch."""
        silence = 2 * KEEPALIVE + self._timeout
        async with deadline_after(silence, f"{short(channel.remote)} sent no sign of life for {silence:g} s"):
            batch: RecordBatch = (await channel.receive()).record
        if batch.clock:
            self._clock.update(batch.clock)
            if self._clock.followed:
                self._warn_of_clock(batch.clock, channel.remote, "the swarm is seen by that one meanwhile")
        await self._replica.merge(batch.records)
        return batch

    async def _judge_clock(self, read: Sequence[SignedRecord], member_time: float, member: PeerId) -> None:
        """Find out whose clock is wrong when no record of a member that was just read holds here."""
        issued = [at for at in map(issued_at, read) if at is not None]
        if self.view().servers or not issued:
            return
        # One who does not tell the time has records that were issued not long ago.
        if not self._clock.differs(time := member_time or max(issued)):
            return
        taken = []
        if member_time:
            self._clock.follow(member_time)
            taken = await self._replica.merge(read)
            if not taken:
                self._clock.release()
        self._warn_of_clock(
            time,
            member,
            "the swarm is seen by that one meanwhile" if taken else "nothing that it tells holds",
        )

    def _warn_of_clock(self, member_time: float, member: PeerId, consequence: str) -> None:
        if not self._clock_warned:
            self._clock_warned = True
            logger.warning(
                "this machine's clock is %s that of %s, so %s: set the clock",
                how_far_off(self._clock.own() - member_time),
                short(member),
                consequence,
            )

    async def _follow(self, channel: Channel) -> None:
        while True:
            try:
                while True:
                    batch = await self._read(channel)
                    suspects = self._replica.store.shown_among(unpack_entries(batch.suspected))
                    for peer, sequence in suspects:
                        self._probes.start(peer, sequence, public=True)
            except SwarmError as exc:
                logger.info("lost sight of the swarm through %s: %s", short(channel.remote), exc)
                self._members.failed(channel.remote, asyncio.get_running_loop().time())
            finally:
                self._channel = None
                _abandon(channel)
            channel = self._channel = await self._move_on()

    async def _move_on(self) -> Channel:
        """A channel to another member, however long it takes to find one."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            candidates = self._members.choose(AT_ONCE, loop.time())
            if lost := self._members.choose_lost(loop.time()):
                candidates.append(lost)
            with contextlib.suppress(PeerUnreachableError):
                if candidates:
                    return await first_answer(candidates, self._watch, dispose=_abandon)
            pause = backoff.next(self._rng)
            logger.info("no member of the swarm answers; trying again in %.1f s", pause)
            await asyncio.sleep(pause)


def _abandon(channel: Channel) -> None:
    channel.abort("the watcher turned away")
