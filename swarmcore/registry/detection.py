"""Failure detection: a dead member is noticed, the swarm is told, and everyone sees for himself.

A suspicion travels at once, before anybody has looked into it, and each member that hears of it calls the
suspect before it hides its record. So a death is known everywhere within one round of gossip and one call,
and nobody can talk a living peer out of the swarm. The suspect, when it hears of it, issues a newer record,
which refutes the suspicion (as in SWIM, Das et al. 2002).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from swarmcore.registry.background import BackgroundTasks
from swarmcore.registry.base import Change
from swarmcore.registry.digest import Key, key_of
from swarmcore.registry.inquiries import Inquiries
from swarmcore.registry.lifelines import Lifelines
from swarmcore.registry.messages import CheckAlive, ReportSuspect, StillAlive, SuspectReported
from swarmcore.registry.options import GossipOptions
from swarmcore.registry.partners import Partners
from swarmcore.registry.replica import Replica
from swarmcore.registry.suspicion import Suspected
from swarmcore.rpc import Caller, Node
from swarmcore.types import PeerId


class FailureDetector:
    """One member's part in it.

    ``spread`` is given each suspicion to be pushed to others, and ``refute`` the number of this peer's own
    record when somebody holds that for a dead peer's.
    """

    def __init__(
        self,
        node: Node,
        replica: Replica,
        partners: Partners,
        options: GossipOptions,
        tasks: BackgroundTasks,
        *,
        spread: Callable[[Suspected], None],
        refute: Callable[[int], None],
    ) -> None:
        self.lifelines = Lifelines(node, partners, options, self)
        self._node = node
        self._replica = replica
        self._spread = spread
        self._refute = refute
        self._enabled = options.lifelines > 0
        self._inquiries = Inquiries(node, replica, partners, tasks, timeout=options.check_timeout)

    def start(self) -> None:
        if self._enabled:
            self.lifelines.start()

    async def close(self) -> None:
        await self.lifelines.close()

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        self.lifelines.update(change)

    def suspect(self, peer: PeerId) -> None:
        """``peer`` did not answer: call it, and if it is dead, hide it and tell the swarm."""
        sequence = self._replica.store.sequence(peer)
        if sequence is not None:
            self._inquiries.open(peer, sequence, on_dead=self._accuse)

    def reached(self, peer: PeerId) -> None:
        """``peer`` has answered. If it was hidden here, others may have been wrongly, too."""
        if self._replica.unhide(peer):
            self._inquiries.recheck()

    def hearsay(self, hidden: Iterable[tuple[Key, int]], teller: PeerId, *, newcomer: bool) -> None:
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
            self._inquiries.recheck()
        elif self._inquiries.credibility.believes(teller, _now()):
            for peer, sequence in suspects:
                self._inquiries.open(peer, sequence, accuser=teller)

    def _accuse(self, peer: PeerId, sequence: int) -> None:
        self._pass_on(Suspected.sign(self._node.identity, peer, sequence))

    def _pass_on(self, suspected: Suspected) -> None:
        self.lifelines.tell(suspected)
        self._spread(suspected)

    # --- what lifelines tell --------------------------------------------------------------------------

    def line_broke(self, peer: PeerId) -> None:
        self.suspect(peer)

    def line_silent(self, peer: PeerId) -> None:
        sequence = self._replica.store.sequence(peer)
        if sequence is not None and self._inquiries.open(peer, sequence, public=True):
            self._accuse(peer, sequence)  # at once: its silence has cost enough time

    def suspected_here(self, sequence: int) -> None:
        self._refute(sequence)

    def hidden_sequence(self, peer: PeerId) -> int:
        return self._replica.store.hidden_sequence(peer)

    def suspicion_heard(self, suspected: Suspected) -> None:
        """Look into it and pass it on, if it is news and from a known member that is worth hearing."""
        store, credibility = self._replica.store, self._inquiries.credibility
        own = self._node.peer
        if suspected.by in (own, suspected.peer) or store.sequence(suspected.by) is None:
            return
        held = store.sequence(suspected.peer)
        if (held is None and suspected.peer != own) or self._inquiries.is_public(suspected.peer):
            return
        if not suspected.is_signed():
            return
        if suspected.peer == own:
            # Whoever it comes from: others may believe it.
            self._refute(suspected.sequence)
            credibility.was_wrong([suspected.by], _now())
            return
        if not credibility.spend(suspected.by, _now()):
            return
        if held is not None and held > suspected.sequence:
            # Refuted, or else the accuser has not seen all that the dead one announced: others may have.
            self._inquiries.open(suspected.peer, held, accuser=suspected.by, on_dead=self._accuse)
        elif self._inquiries.open(suspected.peer, suspected.sequence, accuser=suspected.by, public=True):
            self._pass_on(suspected)

    # --- methods --------------------------------------------------------------------------------------

    async def check(self, request: CheckAlive, caller: Caller) -> StillAlive:
        """Serve `CHECK`."""
        if request.suspected:
            self._refute(request.suspected)
        return StillAlive()

    async def report(self, request: ReportSuspect, caller: Caller) -> SuspectReported:
        """Serve `REPORT`."""
        if self._inquiries.credibility.spend(caller.peer, _now()):
            self._inquiries.open(request.peer, request.sequence, accuser=caller.peer, on_dead=self._accuse)
        return SuspectReported()


def _now() -> float:
    return asyncio.get_running_loop().time()
