"""Failure detection: a dead member is noticed, the swarm is told, and everyone sees for himself.

A suspicion travels at once, before anybody has looked into it, and each member that hears of it calls the
suspect before it hides its record. So a death is known everywhere within one round of gossip and one call,
and nobody can talk a living peer out of the swarm. The suspect, when it hears of it, issues a newer record,
which refutes the suspicion (as in SWIM, Das et al. 2002).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import attrs

from swarmcore.errors import ConnectionLostError, StreamAbortedError, SwarmError, UnknownTransportError
from swarmcore.registry.base import Change
from swarmcore.registry.gossip.digest import Key, key_of
from swarmcore.registry.gossip.heartbeats import Heartbeats
from swarmcore.registry.gossip.members import Members
from swarmcore.registry.gossip.messages import CHECK, CheckAlive, ReportSuspect, StillAlive, SuspectReported
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.suspicion import Credibility, Suspected
from swarmcore.rpc import Caller, Node
from swarmcore.tasks import BackgroundTasks, cancel_and_wait, loop_time
from swarmcore.types import Address, PeerId, ServerInfo, short

logger = logging.getLogger(__name__)

PAUSE = 2.0
"""Seconds between two probes of the same peer."""
AT_ONCE = 128
"""Peers that are called at a time."""
MANY = 64
"""Probes under way from which on publicly suspected peers are given time to speak, and not called."""
REFUTE = 2.0
"""Seconds in which one that lives hears of a public suspicion and is heard refuting it."""
MAX_PROBES = 1024
"""Probes under way, those included that wait for their turn; further suspicions are not looked into."""
DIALLING = 5.0
"""Times its usual round trip that a peer gets to answer, at least."""

_ATTEMPTS = 2


@attrs.define
class _Probe:
    sequence: int
    accusers: set[PeerId]
    public: bool
    on_dead: Callable[[PeerId, int], None] | None


class Probes:
    """The suspects that one peer calls to see whether they live. Each has ``timeout`` seconds to answer."""

    def __init__(
        self, node: Node, replica: Replica, members: Members, tasks: BackgroundTasks, *, timeout: float
    ) -> None:
        self.credibility = Credibility()
        self._node = node
        self._replica = replica
        self._members = members
        self._tasks = tasks
        self._timeout = timeout
        self._running: dict[PeerId, _Probe] = {}
        self._ended: OrderedDict[PeerId, float] = OrderedDict()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._rechecking = False
        self._probing_doubtful: set[PeerId] = set()
        replica.on_doubtful = self._on_doubtful

    def start(
        self,
        peer: PeerId,
        sequence: int,
        *,
        accuser: PeerId | None = None,
        public: bool = False,
        on_dead: Callable[[PeerId, int], None] | None = None,
    ) -> bool:
        """Look into the suspicion that ``peer``, whose record has number ``sequence``, is dead.

        Nothing happens when it is not in the view, or known by a newer record. A suspicion is ``public`` when
        others hear of it as well: then the suspect is told, too. ``on_dead`` is called once the peer is
        hidden, unless the suspicion is public by then. Return whether this is what made it public.
        """
        held = self._replica.store.sequence(peer)
        if held is None or held > sequence or peer == self._node.peer:
            return False
        probe = self._running.get(peer)
        if probe is not None:
            if accuser is not None:
                probe.accusers.add(accuser)
            news = public and not probe.public
            probe.public |= public
            probe.on_dead = probe.on_dead or on_dead
            return news
        if len(self._running) >= MAX_PROBES:
            return False
        accusers = set() if accuser is None else {accuser}
        probe = self._running[peer] = _Probe(sequence, accusers, public, on_dead)
        self._tasks.start(self._probe(peer, probe), "registry probe")
        return public

    def is_public(self, peer: PeerId) -> bool:
        """Whether a public suspicion about ``peer`` is being looked into."""
        return peer in self._running and self._running[peer].public

    def recheck(self) -> None:
        """Call all hidden peers again: they may never have been dead, but this peer cut off."""
        if not self._rechecking:
            self._rechecking = True
            self._tasks.start(self._recheck(), "registry recheck")

    async def _probe(self, peer: PeerId, probe: _Probe) -> None:
        now = asyncio.get_running_loop().time
        try:
            if (pause := self._ended.pop(peer, -PAUSE) + PAUSE - now()) > 0:
                await asyncio.sleep(pause)
            if probe.public and len(self._running) > MANY and not await self._refutes(peer):
                self._replica.hide(peer, probe.sequence)
                return
            info = self._replica.store.info(peer)
            if info is None:
                return
            async with self._slots:
                began = self._replica.now()
                answers = await self._answers(info, probe.sequence if probe.public else 0)
        finally:
            del self._running[peer]
            self._ended[peer] = now()
            if len(self._ended) > MAX_PROBES:
                self._ended.popitem(last=False)
        if answers:
            self.credibility.was_wrong(probe.accusers, now())
        elif answers is not None and self._replica.hide(peer, probe.sequence, issued_before=began):
            logger.info("%s does not answer: out of the view until it announces itself again", short(peer))
            if probe.on_dead is not None and not probe.public:
                probe.on_dead(peer, probe.sequence)

    async def _refutes(self, peer: PeerId) -> bool:
        """Whether there is news of a publicly suspected peer in the time that it has to refute that."""
        held = self._replica.store.sequence(peer)
        await asyncio.sleep(REFUTE)
        return self._replica.store.sequence(peer) != held

    async def _answers(self, info: ServerInfo, suspected: int = 0) -> bool | None:
        """Whether a peer answers at any of its addresses; None when there is no way to ask it."""
        # A peer that is far away is known to be, and is dialled first: that takes some round trips.
        usual = self._node.response_times.of(info.peer).mean
        deadline = asyncio.get_running_loop().time() + max(self._timeout, DIALLING * usual)
        # All at once: an address that only a part of the network can reach must not cost the others time.
        addresses = self._members.of(info).addresses
        if len(addresses) == 1:
            return await self._answers_at(addresses[0], suspected, deadline)
        asking = [asyncio.create_task(self._answers_at(to, suspected, deadline)) for to in addresses]
        verdict: bool | None = None
        try:
            for answer in asyncio.as_completed(asking):
                if (answers := await answer) is not None:
                    verdict = answers
                if answers:
                    break
        finally:
            await cancel_and_wait(*asking)
        return verdict

    async def _answers_at(self, address: Address, suspected: int, deadline: float) -> bool | None:
        now = asyncio.get_running_loop().time
        for _ in range(_ATTEMPTS):
            try:
                timeout = max(deadline - now(), 0.001)
                await self._node.call(address, CHECK, CheckAlive(suspected), timeout=timeout)
            except UnknownTransportError:
                return None
            except SwarmError as exc:
                if exc.origin is not None:  # a refusal is an answer, too
                    return True
                logger.debug("no answer from %s: %s", address, exc)
                if not isinstance(exc, ConnectionLostError | StreamAbortedError):
                    return False
                # Otherwise it was a connection that had been open and may have broken by itself.
            else:
                return True
        return False

    async def _recheck(self) -> None:
        try:
            hidden = [each.info for each in self._replica.store.hidden() if each.info is not None]
            await asyncio.gather(*(self._probe_hidden(info) for info in hidden))
        finally:
            self._rechecking = False

    async def _probe_hidden(self, info: ServerInfo) -> None:
        async with self._slots:
            if await self._answers(info):
                self._replica.unhide(info.peer)

    def _on_doubtful(self, info: ServerInfo) -> None:
        """A hidden peer has announced ``info``: before it died, or on a clock that is late."""
        if info.peer not in self._probing_doubtful and len(self._probing_doubtful) < MAX_PROBES:
            self._probing_doubtful.add(info.peer)
            self._tasks.start(self._probe_doubtful(info), "registry recheck")

    async def _probe_doubtful(self, info: ServerInfo) -> None:
        try:
            await self._probe_hidden(info)
        finally:
            self._probing_doubtful.discard(info.peer)


class FailureDetector:
    """One member's part in it.

    ``spread`` is given each suspicion to be pushed to others, and ``refute`` the number of this peer's own
    record when somebody holds that for a dead peer's.
    """

    def __init__(
        self,
        node: Node,
        replica: Replica,
        members: Members,
        options: GossipOptions,
        tasks: BackgroundTasks,
        *,
        spread: Callable[[Suspected], None],
        refute: Callable[[int], None],
    ) -> None:
        self.heartbeats = Heartbeats(node, members, options, self)
        self._node = node
        self._replica = replica
        self._spread = spread
        self._refute = refute
        self._enabled = options.heartbeat_members > 0
        self._probes = Probes(node, replica, members, tasks, timeout=options.probe_timeout)

    def start(self) -> None:
        if self._enabled:
            self.heartbeats.start()

    async def close(self) -> None:
        await self.heartbeats.close()

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        self.heartbeats.update(change)

    def suspect(self, peer: PeerId) -> None:
        """``peer`` did not answer: call it, and if it is dead, hide it and tell the swarm."""
        sequence = self._replica.store.sequence(peer)
        if sequence is not None:
            self._probes.start(peer, sequence, on_dead=self._accuse)

    def reached(self, peer: PeerId) -> None:
        """``peer`` has answered. If it was hidden here, others may have been wrongly, too."""
        if self._replica.unhide(peer):
            self._probes.recheck()

    def dead_elsewhere(self, hidden: Iterable[tuple[Key, int]], teller: PeerId, *, newcomer: bool) -> None:
        """``teller`` found the owners of these records dead.

        A newcomer, to whom it might as well have not told of them, hides them until it has seen for itself.
        """
        sequences = dict(hidden)
        if sequence := sequences.get(key_of(self._node.peer)):
            self._refute(sequence)
        suspects = self._replica.store.shown_among(sequences.items())
        if newcomer:
            for peer, sequence in suspects:
                self._replica.hide(peer, sequence)
            self._probes.recheck()
        elif self._probes.credibility.believes(teller, loop_time()):
            for peer, sequence in suspects:
                self._probes.start(peer, sequence, accuser=teller)

    def _accuse(self, peer: PeerId, sequence: int) -> None:
        self._pass_on(Suspected.sign(self._node.identity, peer, sequence))

    def _pass_on(self, suspected: Suspected) -> None:
        self.heartbeats.pass_on(suspected)
        self._spread(suspected)

    # --- what heartbeats tell --------------------------------------------------------------------------

    def channel_broke(self, peer: PeerId) -> None:
        self.suspect(peer)

    def went_silent(self, peer: PeerId) -> None:
        sequence = self._replica.store.sequence(peer)
        if sequence is not None and self._probes.start(peer, sequence, public=True):
            self._accuse(peer, sequence)  # at once: its silence has cost enough time

    def suspected_here(self, sequence: int) -> None:
        self._refute(sequence)

    def hidden_sequence(self, peer: PeerId) -> int:
        return self._replica.store.hidden_sequence(peer)

    def suspicion_heard(self, suspected: Suspected) -> None:
        """Look into it and pass it on, if it is news and from a known member that is worth hearing."""
        store, credibility = self._replica.store, self._probes.credibility
        own = self._node.peer
        if suspected.by in (own, suspected.peer) or store.sequence(suspected.by) is None:
            return
        held = store.sequence(suspected.peer)
        if (held is None and suspected.peer != own) or self._probes.is_public(suspected.peer):
            return
        if not suspected.is_signed():
            return
        if suspected.peer == own:
            # Whoever it comes from: others may believe it.
            self._refute(suspected.sequence)
            credibility.was_wrong([suspected.by], loop_time())
            return
        if not credibility.spend(suspected.by, loop_time()):
            return
        if held is not None and held > suspected.sequence:
            # Refuted, or else the accuser has not seen all that the dead one announced: others may have.
            self._probes.start(suspected.peer, held, accuser=suspected.by, on_dead=self._accuse)
        elif self._probes.start(suspected.peer, suspected.sequence, accuser=suspected.by, public=True):
            self._pass_on(suspected)

    # --- methods --------------------------------------------------------------------------------------

    async def check(self, request: CheckAlive, caller: Caller) -> StillAlive:
        """Serve `CHECK`."""
        if request.suspected:
            self._refute(request.suspected)
        return StillAlive()

    async def report(self, request: ReportSuspect, caller: Caller) -> SuspectReported:
        """Serve `REPORT`."""
        if self._probes.credibility.spend(caller.peer, loop_time()):
            self._probes.start(request.peer, request.sequence, accuser=caller.peer, on_dead=self._accuse)
        return SuspectReported()
