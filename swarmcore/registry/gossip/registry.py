"""The embedded default registry: every member keeps all records, and members tell each other what is new."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random

from swarmcore.errors import PeerUnreachableError, SwarmError, UnavailableError
from swarmcore.pacing import jittered
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.changes import ChangeReader
from swarmcore.registry.gossip.anti_entropy import answer_compare, answer_exchange, push_pull
from swarmcore.registry.gossip.broadcast import Broadcaster
from swarmcore.registry.gossip.failure_detector import FailureDetector
from swarmcore.registry.gossip.identity_conflict import IdentityConflict, Resolution
from swarmcore.registry.gossip.members import Member, Members, first_answer
from swarmcore.registry.gossip.messages import (
    CHECK,
    COMPARE,
    EXCHANGE,
    HEARTBEATS,
    REPORT,
    WATCH,
    CheckAlive,
    CompareDigests,
    DigestsCompared,
    ExchangeRecords,
    RecordsExchanged,
)
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.own_record import OwnRecord
from swarmcore.registry.gossip.records import SignedRecord, check_info, without_load
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Accepted, Drop, RecordStore
from swarmcore.registry.gossip.suspicion import Suspected
from swarmcore.registry.gossip.watch_server import WatchServer
from swarmcore.rpc import Caller, Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import Address, PeerId, ServerInfo, short

logger = logging.getLogger(__name__)

_WITHDRAWAL_PATIENCE = 3.0
_CONTEST_PAUSE = 1.0
_REFUTATION_PAUSE = 1.0
_MAX_SUSPICIONS = 256  # of one message


class GossipRegistry(Registry):
    """A full member of the registry; every server and bootstrap peer runs one.

    News goes at once to ``options.fanout`` random members, which pass it on in the same way; every
    ``options.interval`` seconds the records are compared with a random member's, which brings what a push has
    missed. Members are found in the records themselves: ``bootstrap`` is needed to join, and as the way back
    after a network split. A member that has announced nothing is not known to others and only hears of news
    at intervals. A dead member is noticed by those next to it and leaves all views within seconds, whatever
    its ttl (see `FailureDetector`).

    ``node`` is neither started nor closed here; it has to listen before `start`, and can carry one registry
    only. In a node that is closed to all but its allowed peers, records of others are dropped.

    ``announce`` keeps the record fresh by itself (every third of its ttl) until `withdraw` or `close`.
    ``wall_clock`` gives seconds since the epoch: unlike all other times, those in records mean the same to
    every peer.
    """

    def __init__(
        self,
        node: Node,
        bootstrap: Sequence[Address] = (),
        *,
        options: GossipOptions | None = None,
        rng: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        options = options or GossipOptions()
        self.node = node
        self._options = options
        self._rng = rng or Random()
        store = RecordStore(
            own=node.peer, limits=options.limits, capacity=options.capacity, allowed=node.allowed_peers
        )
        self._tasks = BackgroundTasks()
        self._members = Members(node.peer, bootstrap, self._rng)
        self._replica = Replica(store, self._members, wall_clock)
        self._detector = FailureDetector(
            node,
            self._replica,
            self._members,
            options,
            self._tasks,
            spread=self._spread_suspicion,
            refute=self._refute,
        )
        self._replica.on_accepted = self._on_accepted
        self._replica.on_change = self._on_change
        self._conflict = IdentityConflict()
        self._broadcaster = Broadcaster(node, self._members, options, self._detector.suspect)
        self._watch_server = WatchServer(store, node.limits, wall_clock, node.resources)
        self._own = OwnRecord(node.identity, self._replica, self._rng, self._publish)
        self._refuted_at = -math.inf
        self._started = False
        self._clock_warned = False
        self._closed = False
        node.serve(COMPARE, self._compare)
        node.serve(EXCHANGE, self._exchange)
        node.serve(CHECK, self._detector.check)
        node.serve(REPORT, self._detector.report)
        node.serve_protocol(HEARTBEATS, self._detector.heartbeats.serve)
        node.serve_protocol(WATCH, self._watch_server.serve)

    def __repr__(self) -> str:
        watching = len(self._watch_server)
        return f"<GossipRegistry {short(self.node.peer)} {self._replica.store!r} {watching} watching>"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._conflict.note,) if self._conflict.note else ()

    @property
    def dropped(self) -> Mapping[Drop, int]:
        """Records refused so far, by reason."""
        return self._replica.store.dropped

    async def start(self, known: Iterable[SignedRecord] = ()) -> None:
        """Fetch all records from the first bootstrap peer that answers, and begin to gossip.

        Without bootstrap peers other than this one there is nobody to ask: this is the first member. Nobody
        is asked either when there are ``known`` records, from before, that still hold. Raise
        `PeerUnreachableError`, naming what was tried, when none answers; `start` may then be called again.
        Peers that were only introduced need not answer.
        """
        candidates = self._members.candidates
        self._rng.shuffle(candidates)
        if candidates and not await self._replica.merge(known):
            try:
                await first_answer(candidates, self._push_pull)
            except PeerUnreachableError as exc:
                if self._members.bootstrap:
                    raise
                logger.warning("a new swarm begins: %s", exc)
        self._started = True
        self._detector.start()
        self._tasks.start(self._broadcaster.run(), "registry broadcast")
        self._tasks.start(self._anti_entropy(), "registry anti-entropy")

    async def close(self) -> None:
        self._closed = True
        self._own.close()
        self._watch_server.close()
        self._replica.close()
        await self._detector.close()
        await self._tasks.close()

    async def announce(self, info: ServerInfo, ttl: float) -> None:
        """Publish ``info`` and keep it fresh until it is replaced or withdrawn, or the registry is closed.

        Returns once it is on its way to others, which does not wait for them. Raise `InputError` when it may
        not be announced by this peer (see `check_info`), or ``ttl`` or its size is over the limit.
        """
        if self._closed:
            raise UnavailableError("this registry is closed")
        if self._conflict.shown is not None:
            check_info(info, self.node.peer)
            self._own.announced = info, ttl
            return
        if self._own.announced is None:
            self._look_for_conflict()
        self._publish(info, ttl)

    def _look_for_conflict(self) -> None:
        """Whoever is known under this peer's id: a life of its own that has ended, or another process?"""
        before = self._replica.store.info(self.node.peer)
        if before is not None and before.addresses:
            self._tasks.start(self._probe_conflict(before), "identity conflict")

    async def _probe_conflict(self, info: ServerInfo) -> None:
        addresses = info.dialable
        if not set(addresses).isdisjoint(self.node.addresses):
            return
        with contextlib.suppress(SwarmError):
            timeout = self._options.probe_timeout
            await self.node.call(addresses, CHECK, CheckAlive(), timeout=timeout, elsewhere=True)
            self._conflict.answered(info)
            logger.warning("%s", self._conflict.note)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._replica.store.allow_only(peers)

    def introduce(self, addresses: Sequence[Address]) -> None:
        """Compare records with those peers at ``addresses`` that are not known as members: if they have a
        swarm of their own, the two become one, within some intervals. Who does not answer is tried again
        later, as a lost member is."""
        for member in self._members.introduce(addresses):
            if self._started:
                self._tasks.start(self._push_pull_with_one([member]), "registry introduction")

    async def withdraw(self) -> None:
        """Take the announcement back, and wait up to three seconds until the next peers know."""
        if self._own.announced is None:
            return
        if self._conflict.shown is not None:  # what is announced is not this process
            self._own.forget()
            return
        withdrawal = self._own.withdraw()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAWAL_PATIENCE):
                await self._broadcaster.broadcast_now(withdrawal)

    def view(self) -> SwarmView:
        return self._replica.store.view()

    def changes(self) -> ChangeReader:
        return self._replica.feed.reader()

    def suspect(self, peer: PeerId) -> None:
        """Call ``peer``; if it does not answer, hide it here and tell the swarm, which does likewise."""
        if not self._closed:
            self._detector.suspect(peer)

    # --- this peer's own record -----------------------------------------------------------------------

    def _publish(self, info: ServerInfo, ttl: float, *, refuting: bool = False) -> None:
        before = self._own.announced[0] if self._own.announced is not None else None
        record, accepted = self._own.issue(info, ttl)
        self._conflict.announced(self._own.sequence)
        urgent = refuting or (accepted.change is not None and not self._can_wait(before, info))
        if urgent or self._options.broadcasts_refresh(ttl):
            self._broadcaster.add(self.node.peer, record, urgent=urgent)

    def _can_wait(self, before: ServerInfo | None, info: ServerInfo) -> bool:
        """Whether news of this peer is only of its load, and the swarm too large to hear of it at once."""
        return (
            before is not None
            and len(self._replica.store.view()) > self._options.broadcast_load_below
            and without_load(before) == without_load(info)
        )

    def _refute(self, sequence: int) -> None:
        """Answer a suspicion about the record of that number with a newer one, one a second at most."""
        loop = asyncio.get_running_loop()
        if self._own.announced is None or self._closed or sequence != self._own.sequence:
            return
        if (wait := self._refuted_at + _REFUTATION_PAUSE - loop.time()) > 0:
            loop.call_later(wait, self._refute, sequence)
            return
        self._refuted_at = loop.time()
        logger.info("suspected to be dead: announcing again")
        self._publish(*self._own.announced, refuting=True)

    def _on_accepted(self, record: SignedRecord, accepted: Accepted) -> None:
        announcement = accepted.announcement
        self._watch_server.offer(record, accepted)
        if announcement.peer != self.node.peer or not self._own.issued_elsewhere(announcement.sequence):
            return
        if self._own.announced is None:
            return
        known = self._conflict.note
        if self._conflict.resolve(announcement, self._own.announced[0]) is Resolution.ANNOUNCE:
            self._own.refresh_in(_CONTEST_PAUSE)
        else:
            self._own.pause()
        if self._conflict.note not in ("", known):
            logger.warning("%s", self._conflict.note)

    def _on_change(self, change: Change) -> None:
        self._detector.update(change)
        if change.kind == "left" and change.info.peer == self.node.peer and self._conflict.shown is not None:
            self._own.refresh_in(0.0)  # the process that was shown has gone

    # --- gossip ---------------------------------------------------------------------------------------

    async def _anti_entropy(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(jittered(self._options.interval, self._rng))
            lost = self._members.choose_lost(loop.time())
            await asyncio.gather(
                self._push_pull_with_one(self._members.choose(3, loop.time())),
                self._push_pull_with_one([lost] if lost else []),
            )

    async def _push_pull_with_one(self, candidates: Sequence[Member]) -> None:
        for member in candidates:
            try:
                await self._push_pull(member)
            except SwarmError as exc:
                logger.debug("could not compare records with %s: %s", short(member.peer), exc)
            else:
                return

    async def _push_pull(self, member: Member) -> None:
        now = asyncio.get_running_loop().time
        try:
            result = await push_pull(self.node, self._replica, member, timeout=self._options.timeout)
        except SwarmError:
            self._members.failed(member.peer, now())
            self._detector.suspect(member.peer)
            raise
        self._members.answered(member.peer)
        self._detector.reached(member.peer)
        self._detector.dead_elsewhere(result.hidden, member.peer, newcomer=not self._started)
        self._check_clock(result.ahead, member.peer)

    def _check_clock(self, ahead: float, peer: PeerId) -> None:
        off = abs(ahead) > self._replica.store.limits.max_skew
        if off and not self._clock_warned:
            logger.warning(
                "the clock of %s is %+.0f s off this one; records are dropped above %.0f s: set the clocks",
                short(peer),
                ahead,
                self._replica.store.limits.max_skew,
            )
        self._clock_warned = off

    async def _compare(self, request: CompareDigests, caller: Caller) -> DigestsCompared:
        self._refuse_when_closed()
        return answer_compare(self._replica, request)

    async def _exchange(self, request: ExchangeRecords, caller: Caller) -> RecordsExchanged:
        self._refuse_when_closed()
        reply, taken = await answer_exchange(self.node, self._replica, request)
        if request.spread:
            for record, accepted in taken:
                news = accepted.announcement
                urgent = accepted.change is not None or not self._options.broadcasts_refresh(news.ttl)
                self._broadcaster.add(news.peer, record, urgent=urgent)
        for suspected in request.suspected[:_MAX_SUSPICIONS]:
            self._detector.suspicion_heard(suspected)
        return reply

    def _spread_suspicion(self, suspected: Suspected) -> None:
        self._watch_server.suspect(suspected.peer, suspected.sequence)
        self._broadcaster.add_suspicion(suspected)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise UnavailableError("this peer has left the registry; ask another one")
