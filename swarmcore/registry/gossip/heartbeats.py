"""Lifelines: each member holds a channel to the next ones on the ring, to notice when they die.

A killed process is noticed within a round trip, because its operating system closes the channel. A host that
hangs or is cut off is noticed by its silence, at both ends: so each member is watched by the two before it
and the two behind it.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect, insort
from collections.abc import Collection
from enum import Enum, auto
from typing import Protocol

import attrs

from swarmcore.errors import (
    DeadlineExceededError,
    ProtocolError,
    StreamClosedError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.pacing import Backoff
from swarmcore.registry.base import Change
from swarmcore.registry.gossip.digest import Key, key_of
from swarmcore.registry.gossip.members import Partners
from swarmcore.registry.gossip.messages import LIFELINE, Beat, HoldLine
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.suspicion import Suspected
from swarmcore.rpc import Channel, Node
from swarmcore.tasks import BackgroundTasks, running
from swarmcore.types import PeerId, short


class Ring:
    """Peers in the order of the hashes of their ids. ``own`` has a place on it without being listed."""

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._key = key_of(own)
        self._places: list[tuple[Key, PeerId]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, peer: PeerId) -> None:
        """Harmless when repeated."""
        place = (key_of(peer), peer)
        at = bisect(self._places, place)
        if peer != self._own and (at == 0 or self._places[at - 1] != place):
            insort(self._places, place)

    def discard(self, peer: PeerId) -> None:
        place = (key_of(peer), peer)
        at = bisect(self._places, place) - 1
        if at >= 0 and self._places[at] == place:
            del self._places[at]

    def successors(self, count: int, skipped: Collection[PeerId] = ()) -> list[PeerId]:
        """The next ``count`` peers after ``own``, those in ``skipped`` passed over."""
        start = bisect(self._places, (self._key, self._own))
        found: list[PeerId] = []
        for step in range(len(self._places)):
            if len(found) == count:
                break
            peer = self._places[(start + step) % len(self._places)][1]
            if peer not in skipped:
                found.append(peer)
        return found


logger = logging.getLogger(__name__)

MAX_LINES = 64
MAX_OF_PEER = 4
"""Lifelines that others may hold here."""
SILENT_BEATS = 4
"""Beats that may be missing before a line counts as silent."""
FASTEST_BEAT = 0.1
SLOWEST_BEAT = 60.0
GATHER = 0.02
"""Seconds in which suspicions gather before they are sent together."""
BUSY_GATHER = 0.2
"""The same when the last ones were sent less than `BUSY` seconds ago."""
BUSY = 1.0
SETTLE = 0.2
"""Seconds after a change of the ring until lines follow it."""
LINGER = 10.0
"""Seconds for which a line is kept that is no longer needed: members come and go."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
_MAX_WAITING = 256
_SEND_TIMEOUT = 10.0


class Watch(Protocol):
    """Who is told what is heard on the lines."""

    def line_broke(self, peer: PeerId) -> None:
        """The line to ``peer`` broke, or could not be opened."""

    def line_silent(self, peer: PeerId) -> None:
        """``peer`` has been silent for too long."""

    def suspicion_heard(self, suspected: Suspected) -> None: ...

    def suspected_here(self, sequence: int) -> None:
        """A neighbour has this peer's record of number ``sequence`` for that of a dead peer."""

    def hidden_sequence(self, peer: PeerId) -> int:
        """Number of the record of ``peer`` if it counts as dead here; else 0."""


class Lifelines:
    """Opens, keeps and closes one member's lifelines as the ring changes."""

    def __init__(self, node: Node, partners: Partners, options: GossipOptions, watch: Watch) -> None:
        self._node = node
        self._partners = partners
        self._options = options
        self._watch = watch
        self._ring = Ring(node.peer)
        self._held: dict[PeerId, _Line | None] = {}  # by whom they lead to; None while dialling
        self._accepted: dict[_Line, None] = {}
        self._pauses: dict[PeerId, _Pause] = {}
        self._surplus: dict[PeerId, asyncio.TimerHandle] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks = BackgroundTasks()
        self._settling: asyncio.TimerHandle | None = None
        self._running = False
        self._closed = False

    def __repr__(self) -> str:
        to = " ".join(short(peer) for peer, line in self._held.items() if line) or "nobody"
        return f"<Lifelines to {to} · {len(self._accepted)} from others>"

    def start(self) -> None:
        """Begin to hold lines; until then the ring is only followed."""
        self._running = True
        self._settle()

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        if change.kind == "left" or not change.info.addresses:
            self._ring.discard(change.info.peer)
        else:
            self._ring.add(change.info.peer)
        if change.kind != "updated" and self._running and not self._closed and self._settling is None:
            # Many leave together, or join: lines to those who are neighbours for a moment are not worth it.
            self._settling = asyncio.get_running_loop().call_later(SETTLE, self._settle)

    def tell(self, suspected: Suspected) -> None:
        """Pass a suspicion on to all neighbours."""
        for line in (*self._held.values(), *self._accepted):
            if line is not None:
                line.tell(suspected)

    async def serve(self, channel: Channel) -> None:
        """Handle a lifeline that another member holds here.

        Raise `TooManyCallsError` above `MAX_LINES`, or `MAX_OF_PEER` of one member, and `ProtocolError` for
        a beat that is no time.
        """
        peer = channel.remote
        if len(self._accepted) >= MAX_LINES:
            raise TooManyCallsError(f"{MAX_LINES} lifelines end here, the limit")
        if sum(line.peer == peer for line in self._accepted) >= MAX_OF_PEER:
            raise TooManyCallsError(f"{MAX_OF_PEER} lifelines of yours end here, the limit of one member")
        opening: HoldLine = channel.opening.record
        if not opening.beat >= 0:  # nor NaN, which no clock can wait for
            raise ProtocolError(f"a lifeline with a beat of {opening.beat} s; expected 0 or more")
        beat = opening.beat and min(max(opening.beat, FASTEST_BEAT), SLOWEST_BEAT)
        line = _Line(channel, beat, self._watch)
        self._accepted[line] = None
        try:
            if self._closed or await line.run() is not _End.SILENT:
                return
        except (asyncio.CancelledError, SwarmError) as exc:
            # A handler whose channel breaks is cancelled, unless it notices by itself.
            if not self._closed and not isinstance(exc, StreamClosedError):
                self._watch.line_broke(peer)
            raise
        finally:
            del self._accepted[line]
        self._watch.line_silent(peer)

    async def close(self) -> None:
        self._closed = True
        for line in self._accepted:
            line.end()
        for timer in (*self._surplus.values(), *self._timers):
            timer.cancel()
        if self._settling is not None:
            self._settling.cancel()
        await self._tasks.close()

    # --- which lines to hold --------------------------------------------------------------------------

    def _settle(self) -> None:
        """Open the lines that are missing; let those that are not needed end after a while."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if not self._running or self._closed:
            return
        loop = asyncio.get_running_loop()
        paused = {peer for peer, pause in self._pauses.items() if loop.time() < pause.until}
        wanted = self._ring.successors(self._options.lifelines, paused)
        for peer in wanted:
            if (timer := self._surplus.pop(peer, None)) is not None:
                timer.cancel()
            if peer not in self._held:
                self._held[peer] = None
                self._tasks.start(self._hold(peer), "lifeline")
        for peer in self._held:
            if peer not in wanted and peer not in self._surplus:
                self._surplus[peer] = loop.call_later(LINGER, self._let_go, peer)

    def _let_go(self, peer: PeerId) -> None:
        del self._surplus[peer]
        if line := self._held.get(peer):
            line.end()

    def _pause(self, peer: PeerId) -> None:
        """Leave ``peer`` alone for a while, longer each time; its successor is dialled meanwhile."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for known in [p for p, pause in self._pauses.items() if now > pause.until + 2 * LONGEST_PAUSE]:
            del self._pauses[known]
        before = self._pauses.get(peer)
        backoff = before.backoff if before else Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        seconds = backoff.next()
        self._pauses[peer] = _Pause(now + seconds, backoff)

        def over() -> None:
            self._timers.discard(timer)
            self._settle()

        timer = loop.call_later(seconds, over)
        self._timers.add(timer)

    async def _hold(self, peer: PeerId) -> None:
        now = asyncio.get_running_loop().time
        started, end = now(), _End.BROKEN
        try:
            end = await self._run(peer)
        except DeadlineExceededError:
            end = _End.SILENT
        except SwarmError as exc:
            logger.debug("no lifeline to %s: %s", short(peer), exc)
            if exc.origin is not None or isinstance(exc, StreamClosedError):
                end = _End.ENDED  # it is alive, and wants none
        finally:
            del self._held[peer]
            if (timer := self._surplus.pop(peer, None)) is not None:
                timer.cancel()
        if now() - started > LINGER:
            self._pauses.pop(peer, None)
        if end is not _End.LET_GO:
            self._pause(peer)
        self._settle()
        if end is _End.BROKEN:
            self._watch.line_broke(peer)
        elif end is _End.SILENT:
            self._watch.line_silent(peer)

    async def _run(self, peer: PeerId) -> _End:
        partner = self._partners.live(peer)
        if partner is None:
            return _End.LET_GO
        opening = HoldLine(self._options.beat)
        channel = await self._node.open(
            partner.addresses, LIFELINE, opening, timeout=self._options.check_timeout
        )
        line = self._held[peer] = _Line(channel, self._options.beat, self._watch)
        try:
            end = await line.run()
        except BaseException:
            channel.abort("the lifeline was let go")
            raise
        if end is _End.SILENT:
            channel.abort("silent for too long")
        else:
            await channel.close()
        return end


@attrs.frozen
class _Pause:
    until: float
    backoff: Backoff


class _End(Enum):
    """How a line ended."""

    ENDED = auto()  # by the other side, in good order
    LET_GO = auto()  # by this side
    SILENT = auto()
    BROKEN = auto()


class _Line:
    """One lifeline, the same at both ends."""

    def __init__(self, channel: Channel, beat: float, watch: Watch) -> None:
        self.peer = channel.remote
        self._channel = channel
        self._beat = beat
        self._watch = watch
        self._waiting: dict[PeerId, Suspected] = {}
        self._wake = asyncio.Event()
        self._heard = False
        self._ended = False

    def tell(self, suspected: Suspected) -> None:
        if len(self._waiting) < _MAX_WAITING:
            self._waiting[suspected.peer] = suspected
            self._wake.set()

    def end(self) -> None:
        """Let go of the line in good order."""
        self._ended = True
        self._wake.set()

    async def run(self) -> _End:
        """Send beats and hear those of the other side until the line ends. Raise what broke it."""
        async with running(self._listen(), "lifeline listener") as listening:
            listening.add_done_callback(lambda _: self._wake.set())
            return await self._speak(listening)

    async def _speak(self, listening: asyncio.Task[None]) -> _End:
        loop = asyncio.get_running_loop()
        silent, due, told = 0, loop.time(), -BUSY
        while not self._ended:
            if listening.done():
                listening.result()
                return _End.ENDED
            if self._beat and loop.time() >= due:
                # Beats are counted, not seconds: a process that was stopped itself does not take the pause
                # for the silence of others.
                silent = 0 if self._heard else silent + 1
                self._heard = False
                if silent > SILENT_BEATS:
                    return _End.SILENT
                due = loop.time() + self._beat
            elif not self._waiting and self._beat:
                await self._until(due)
                continue
            if self._waiting:
                await asyncio.sleep(BUSY_GATHER if loop.time() < told + BUSY else GATHER)
                told = loop.time()
            if not await self._send():
                return _End.SILENT
            await self._until(due if self._beat else None)
        return _End.LET_GO

    async def _until(self, due: float | None) -> None:
        try:
            async with asyncio.timeout_at(due):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    async def _send(self) -> bool:
        """Whether the other side takes it."""
        waiting, self._waiting = tuple(self._waiting.values()), {}
        hidden = self._watch.hidden_sequence(self._channel.remote)
        try:
            async with asyncio.timeout(self._beat * SILENT_BEATS or _SEND_TIMEOUT):
                await self._channel.send(Beat(waiting, hidden))
        except TimeoutError:
            return False
        return True

    async def _listen(self) -> None:
        while True:
            try:
                beat: Beat = (await self._channel.receive()).record
            except StreamClosedError:
                return
            self._heard = True
            for suspected in beat.suspected[:_MAX_WAITING]:
                self._watch.suspicion_heard(suspected)
            if beat.hidden:
                self._watch.suspected_here(beat.hidden)
