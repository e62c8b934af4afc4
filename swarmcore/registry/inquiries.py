"""Seeing for oneself: a suspect is called, and hidden only if it does not answer.

Where very many are suspected at a time, not everybody calls those that everybody has heard accused:
one that lives has heard it as well, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

import attrs

from swarmcore.errors import ConnectionLostError, StreamAbortedError, SwarmError, UnknownTransportError
from swarmcore.registry.background import BackgroundTasks
from swarmcore.registry.messages import CHECK, CheckAlive
from swarmcore.registry.partners import Partners
from swarmcore.registry.replica import Replica
from swarmcore.registry.suspicion import Credibility
from swarmcore.rpc import Node
from swarmcore.types import Address, PeerId, ServerInfo, short

logger = logging.getLogger(__name__)

PAUSE = 2.0
"""Seconds between two inquiries about the same peer."""
AT_ONCE = 128
"""Peers that are called at a time."""
MANY = 64
"""Inquiries under way from which on publicly suspected peers are given time to speak, and not called."""
REFUTE = 2.0
"""Seconds in which one that lives hears of a public suspicion and is heard refuting it."""
MAX_OPEN = 1024
"""Inquiries under way, those included that wait for their turn; further suspicions are not looked into."""
DIALLING = 5.0
"""Times its usual round trip that a peer gets to answer, at least."""

_ATTEMPTS = 2


@attrs.define
class _Inquiry:
    sequence: int
    accusers: set[PeerId]
    public: bool
    on_dead: Callable[[PeerId, int], None] | None


class Inquiries:
    """The suspects that one peer looks into. Each has ``timeout`` seconds to answer."""

    def __init__(
        self, node: Node, replica: Replica, partners: Partners, tasks: BackgroundTasks, *, timeout: float
    ) -> None:
        self.credibility = Credibility()
        self._node = node
        self._replica = replica
        self._partners = partners
        self._tasks = tasks
        self._timeout = timeout
        self._open: dict[PeerId, _Inquiry] = {}
        self._ended: OrderedDict[PeerId, float] = OrderedDict()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._rechecking = False
        self._doubted: set[PeerId] = set()
        replica.on_doubtful = self._doubt

    def open(
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
        inquiry = self._open.get(peer)
        if inquiry is not None:
            if accuser is not None:
                inquiry.accusers.add(accuser)
            news = public and not inquiry.public
            inquiry.public |= public
            inquiry.on_dead = inquiry.on_dead or on_dead
            return news
        if len(self._open) >= MAX_OPEN:
            return False
        accusers = set() if accuser is None else {accuser}
        inquiry = self._open[peer] = _Inquiry(sequence, accusers, public, on_dead)
        self._tasks.start(self._inquire(peer, inquiry), "registry inquiry")
        return public

    def is_public(self, peer: PeerId) -> bool:
        """Whether a public suspicion about ``peer`` is being looked into."""
        return peer in self._open and self._open[peer].public

    def recheck(self) -> None:
        """Call all hidden peers again: they may never have been dead, but this peer cut off."""
        if not self._rechecking:
            self._rechecking = True
            self._tasks.start(self._recheck(), "registry recheck")

    async def _inquire(self, peer: PeerId, inquiry: _Inquiry) -> None:
        now = asyncio.get_running_loop().time
        try:
            if (pause := self._ended.pop(peer, -PAUSE) + PAUSE - now()) > 0:
                await asyncio.sleep(pause)
            if inquiry.public and len(self._open) > MANY and not await self._speaks(peer):
                self._replica.hide(peer, inquiry.sequence)
                return
            info = self._replica.store.info(peer)
            if info is None:
                return
            async with self._slots:
                began = self._replica.now()
                answers = await self._answers(info, inquiry.sequence if inquiry.public else 0)
        finally:
            del self._open[peer]
            self._ended[peer] = now()
            if len(self._ended) > MAX_OPEN:
                self._ended.popitem(last=False)
        if answers:
            self.credibility.was_wrong(inquiry.accusers, now())
        elif answers is not None and self._replica.hide(peer, inquiry.sequence, issued_before=began):
            logger.info("%s does not answer: out of the view until it announces itself again", short(peer))
            if inquiry.on_dead is not None and not inquiry.public:
                inquiry.on_dead(peer, inquiry.sequence)

    async def _speaks(self, peer: PeerId) -> bool:
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
        addresses = self._partners.reached_by(info).addresses
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
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
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
            hidden = [said.info for said in self._replica.store.hidden() if said.info is not None]
            await asyncio.gather(*(self._look_again(info) for info in hidden))
        finally:
            self._rechecking = False

    async def _look_again(self, info: ServerInfo) -> None:
        async with self._slots:
            if await self._answers(info):
                self._replica.unhide(info.peer)

    def _doubt(self, info: ServerInfo) -> None:
        """A hidden peer has announced ``info``: before it died, or on a clock that is late."""
        if info.peer not in self._doubted and len(self._doubted) < MAX_OPEN:
            self._doubted.add(info.peer)
            self._tasks.start(self._resolve(info), "registry recheck")

    async def _resolve(self, info: ServerInfo) -> None:
        try:
            await self._look_again(info)
        finally:
            self._doubted.discard(info.peer)
