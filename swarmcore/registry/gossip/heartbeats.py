"""Heartbeats: each member holds a channel to the next ones on the ring, to notice when they die.

A killed process is noticed within a round trip, because its operating system closes the channel. A host that
hangs or is cut off is noticed by its silence, at both ends: so each member is watched by the two before it
and the two behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from bisect import bisect, insort
from collections.abc import Collection
from enum import Enum, auto
from typing import Protocol

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
from swarmcore.registry.gossip.members import Members
from swarmcore.registry.gossip.messages import HEARTBEATS, Heartbeat, OpenHeartbeats
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.suspicion import Suspected
from swarmcore.rpc import Channel, Node
from swarmcore.tasks import BackgroundTasks, running
from swarmcore.types import PeerId, short

logger = logging.getLogger(__name__)


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


MAX_ACCEPTED = 64
MAX_OF_PEER = 4
"""Channels that others may open here."""
SILENT_HEARTBEATS = 4
"""Heartbeats that may be missing in a row before the other side counts as silent."""
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.1, 60.0
"""Seconds between heartbeats that others may ask for."""
GATHER = 0.02
"""Seconds in which suspicions gather before they are sent together."""
BUSY_GATHER = 0.2
"""The same when the last ones were sent less than `BUSY` seconds ago."""
BUSY = 1.0
ADJUST_DELAY = 0.2
"""Seconds after a change of the ring until the channels follow it."""
LINGER = 10.0
"""Seconds for which a channel is kept that is no longer needed: members come and go."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
_MAX_WAITING = 256
_SEND_TIMEOUT = 10.0


class HeartbeatObserver(Protocol):
    """Who is told of what the heartbeats show."""

    def channel_broke(self, peer: PeerId) -> None:
        """The channel to ``peer`` broke, or could not be opened."""

    def went_silent(self, peer: PeerId) -> None:
        """``peer`` has been silent for too long."""

    def suspicion_heard(self, suspected: Suspected) -> None: ...

    def suspected_here(self, sequence: int) -> None:
        """A neighbour has this peer's record of number ``sequence`` for that of a dead peer."""

    def hidden_sequence(self, peer: PeerId) -> int:
        """Number of the record of ``peer`` if it counts as dead here; else 0."""


class Heartbeats:
    """Opens, keeps and closes one member's heartbeat channels as the ring changes."""

    def __init__(
        self, node: Node, members: Members, options: GossipOptions, observer: HeartbeatObserver
    ) -> None:
        self._node = node
        self._members = members
        self._options = options
        self._observer = observer
        self._ring = Ring(node.peer)
        self._opened: dict[PeerId, _Monitor | None] = {}  # None while dialling
        self._accepted: dict[_Monitor, None] = {}
        self._backoffs: dict[PeerId, Backoff] = {}
        self._surplus: dict[PeerId, asyncio.TimerHandle] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks = BackgroundTasks()
        self._adjusting: asyncio.TimerHandle | None = None
        self._running = False
        self._closed = False

    def __repr__(self) -> str:
        to = " ".join(short(peer) for peer, monitor in self._opened.items() if monitor) or "nobody"
        return f"<Heartbeats to {to} · {len(self._accepted)} from others>"

    def start(self) -> None:
        """Begin to open channels; until then the ring is only followed."""
        self._running = True
        self._adjust()

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        if change.kind == "left" or not change.info.addresses:
            self._ring.discard(change.info.peer)
        else:
            self._ring.add(change.info.peer)
        if change.kind != "updated" and self._running and not self._closed and self._adjusting is None:
            # Many leave together, or join: who is a neighbour for a moment only is not worth a channel.
            self._adjusting = asyncio.get_running_loop().call_later(ADJUST_DELAY, self._adjust)

    def pass_on(self, suspected: Suspected) -> None:
        """Pass a suspicion on to all neighbours."""
        for monitor in (*self._opened.values(), *self._accepted):
            if monitor is not None:
                monitor.pass_on(suspected)

    async def serve(self, channel: Channel) -> None:
        """Handle a heartbeat channel that another member opens.

        Raise `TooManyCallsError` above `MAX_ACCEPTED`, or `MAX_OF_PEER` of one member, and `ProtocolError`
        for an interval that is no time.
        """
        peer = channel.remote
        if len(self._accepted) >= MAX_ACCEPTED:
            raise TooManyCallsError(f"{MAX_ACCEPTED} members send heartbeats here, the limit")
        if sum(monitor.peer == peer for monitor in self._accepted) >= MAX_OF_PEER:
            raise TooManyCallsError(f"{MAX_OF_PEER} heartbeat channels of yours end here, the limit of one")
        opening: OpenHeartbeats = channel.opening.record
        if not opening.beat >= 0:  # nor NaN, which no clock can wait for
            raise ProtocolError(f"a heartbeat every {opening.beat} s; expected 0 or more")
        interval = opening.beat and min(max(opening.beat, SHORTEST_INTERVAL), LONGEST_INTERVAL)
        monitor = _Monitor(channel, interval, self._observer)
        self._accepted[monitor] = None
        try:
            if self._closed or await monitor.run() is not _End.SILENT:
                return
        except (asyncio.CancelledError, SwarmError) as exc:
            # A handler whose channel breaks is cancelled, unless it notices by itself.
            if not self._closed and not isinstance(exc, StreamClosedError):
                self._observer.channel_broke(peer)
            raise
        finally:
            del self._accepted[monitor]
        self._observer.went_silent(peer)

    async def close(self) -> None:
        self._closed = True
        for monitor in self._accepted:
            monitor.stop()
        for timer in (*self._surplus.values(), *self._timers):
            timer.cancel()
        if self._adjusting is not None:
            self._adjusting.cancel()
        await self._tasks.close()

    # --- which channels to keep open ------------------------------------------------------------------

    def _adjust(self) -> None:
        """Open the channels that are missing; close those that are not needed after a while."""
        if self._adjusting is not None:
            self._adjusting.cancel()
            self._adjusting = None
        if not self._running or self._closed:
            return
        loop = asyncio.get_running_loop()
        paused = {peer for peer, backoff in self._backoffs.items() if loop.time() < backoff.until}
        wanted = self._ring.successors(self._options.heartbeat_members, paused)
        for peer in wanted:
            if (timer := self._surplus.pop(peer, None)) is not None:
                timer.cancel()
            if peer not in self._opened:
                self._opened[peer] = None
                self._tasks.start(self._monitor(peer), "heartbeats")
        for peer in self._opened:
            if peer not in wanted and peer not in self._surplus:
                self._surplus[peer] = loop.call_later(LINGER, self._end_surplus, peer)

    def _end_surplus(self, peer: PeerId) -> None:
        del self._surplus[peer]
        if monitor := self._opened.get(peer):
            monitor.stop()

    def _pause(self, peer: PeerId) -> None:
        """Leave ``peer`` alone for a while, longer each time; its successor is dialled meanwhile."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for known in [p for p, each in self._backoffs.items() if now > each.until + 2 * LONGEST_PAUSE]:
            del self._backoffs[known]
        seconds = self._backoffs.setdefault(peer, Backoff(FIRST_PAUSE, LONGEST_PAUSE)).failed(now)

        def over() -> None:
            self._timers.discard(timer)
            self._adjust()

        timer = loop.call_later(seconds, over)
        self._timers.add(timer)

    async def _monitor(self, peer: PeerId) -> None:
        now = asyncio.get_running_loop().time
        started, end = now(), _End.BROKEN
        try:
            end = await self._run(peer)
        except DeadlineExceededError:
            end = _End.SILENT
        except SwarmError as exc:
            logger.debug("no heartbeats with %s: %s", short(peer), exc)
            if exc.origin is not None or isinstance(exc, StreamClosedError):
                end = _End.ENDED  # it is alive, and wants none
        finally:
            del self._opened[peer]
            if (timer := self._surplus.pop(peer, None)) is not None:
                timer.cancel()
        if now() - started > LINGER:
            self._backoffs.pop(peer, None)
        if end is not _End.STOPPED:
            self._pause(peer)
        self._adjust()
        if end is _End.BROKEN:
            self._observer.channel_broke(peer)
        elif end is _End.SILENT:
            self._observer.went_silent(peer)

    async def _run(self, peer: PeerId) -> _End:
        member = self._members.live(peer)
        if member is None:
            return _End.STOPPED
        opening = OpenHeartbeats(self._options.heartbeat_interval)
        channel = await self._node.open(
            member.addresses, HEARTBEATS, opening, timeout=self._options.probe_timeout
        )
        monitor = self._opened[peer] = _Monitor(channel, self._options.heartbeat_interval, self._observer)
        try:
            end = await monitor.run()
        except BaseException:
            channel.abort("the heartbeats were stopped")
            raise
        if end is _End.SILENT:
            channel.abort("silent for too long")
        else:
            await channel.close()
        return end


class _End(Enum):
    """How a heartbeat channel ended."""

    ENDED = auto()  # by the other side, in good order
    STOPPED = auto()  # by this side
    SILENT = auto()
    BROKEN = auto()


class _Monitor:
    """One heartbeat channel, the same at both ends."""

    def __init__(self, channel: Channel, interval: float, observer: HeartbeatObserver) -> None:
        self.peer = channel.remote
        self._channel = channel
        self._interval = interval
        self._observer = observer
        self._waiting: dict[PeerId, Suspected] = {}
        self._wake = asyncio.Event()
        self._heard = False
        self._stopped = False

    def pass_on(self, suspected: Suspected) -> None:
        if len(self._waiting) < _MAX_WAITING:
            self._waiting[suspected.peer] = suspected
            self._wake.set()

    def stop(self) -> None:
        """End the channel in good order."""
        self._stopped = True
        self._wake.set()

    async def run(self) -> _End:
        """Send heartbeats and hear those of the other side until the channel ends. Raise what broke it."""
        async with running(self._receive_heartbeats(), "heartbeat receiver") as receiving:
            receiving.add_done_callback(lambda _: self._wake.set())
            return await self._send_heartbeats(receiving)

    async def _send_heartbeats(self, receiving: asyncio.Task[None]) -> _End:
        loop = asyncio.get_running_loop()
        silent, due, passed_on_at = 0, loop.time(), -BUSY
        while not self._stopped:
            if receiving.done():
                receiving.result()
                return _End.ENDED
            if self._interval and loop.time() >= due:
                # Heartbeats are counted, not seconds: a process that was stopped itself does not take the
                # pause for the silence of others.
                silent = 0 if self._heard else silent + 1
                self._heard = False
                if silent > SILENT_HEARTBEATS:
                    return _End.SILENT
                due = loop.time() + self._interval
            elif not self._waiting and self._interval:
                await self._wait_until(due)
                continue
            if self._waiting:
                await asyncio.sleep(BUSY_GATHER if loop.time() < passed_on_at + BUSY else GATHER)
                passed_on_at = loop.time()
            if not await self._send_one():
                return _End.SILENT
            await self._wait_until(due if self._interval else None)
        return _End.STOPPED

    async def _wait_until(self, due: float | None) -> None:
        """Until ``due``, or until there is something to do."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                await self._wake.wait()
            self._wake.clear()

    async def _send_one(self) -> bool:
        """Whether the other side takes it."""
        waiting, self._waiting = tuple(self._waiting.values()), {}
        hidden = self._observer.hidden_sequence(self._channel.remote)
        try:
            async with asyncio.timeout(self._interval * SILENT_HEARTBEATS or _SEND_TIMEOUT):
                await self._channel.send(Heartbeat(waiting, hidden))
        except TimeoutError:
            return False
        return True

    async def _receive_heartbeats(self) -> None:
        while True:
            try:
                heartbeat: Heartbeat = (await self._channel.receive()).record
            except StreamClosedError:
                return
            self._heard = True
            for suspected in heartbeat.suspected[:_MAX_WAITING]:
                self._observer.suspicion_heard(suspected)
            if heartbeat.hidden:
                self._observer.suspected_here(heartbeat.hidden)
