"""The connections to other peers, by peer: made, in use, idle, lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import attrs

from swarmcore.errors import StreamClosedError, SwarmError
from swarmcore.pacing import TokenBucket
from swarmcore.resources import Reservation
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.channel_transport import ChannelTransport
from swarmcore_transports.webrtc.engine import DataChannel, PeerConnection

logger = logging.getLogger(__name__)

_RESTART_RATE, _RESTART_BURST = 0.5, 8.0

IDLE_SECONDS = 90.0
"""How long a connection without a channel is kept; channels themselves are kept for a minute."""


@attrs.define(eq=False)
class ManagedConnection:
    """The connection to one peer, being made or made, with the channels over it and how it came about."""

    peer: PeerId
    connection: PeerConnection
    negotiation_id: bytes
    """Under which the two sides have signalled, and do so again for a new path."""
    dialled: ServiceAddress | None = None
    """The signalling service by which this side dialled; None when the peer has dialled."""
    sockets: Reservation | None = None
    """The descriptors that ICE takes; it makes room for others while it carries nothing."""
    channels: set[ChannelTransport] = attrs.field(factory=set)
    idle_since: float = 0.0
    restarting: bool = False
    restarted_at: float = float("-inf")
    restart_limit: TokenBucket = attrs.field(factory=lambda: TokenBucket(_RESTART_RATE, _RESTART_BURST))
    """How often the peer may ask for a new path."""

    async def close(self) -> None:
        """Close the connection and release its descriptors. Harmless when repeated."""
        try:
            await self.connection.close()
        finally:
            if self.sockets:
                self.sockets.release()

    def silent_for(self, now: float) -> float:
        """Seconds without a byte from the peer on any channel; 0 when there is no channel to hear it on."""
        return now - max((channel.heard_at for channel in self.channels), default=now)

    def __repr__(self) -> str:
        path, channels = self.connection.path, len(self.channels)
        return f"<ManagedConnection {short(self.peer)} · {path} · {channels} channels>"


class PeerConnections:
    """All that are connected. New channels of a peer go over its latest connection; those before it live as
    long as their channels. One without channels is closed after `IDLE_SECONDS`. ``on_lost`` is told of each
    that ends.
    """

    def __init__(
        self, limits: Limits, on_lost: Callable[[ManagedConnection], None] = lambda managed: None
    ) -> None:
        self._max_connections = limits.max_calls
        self._max_channels = 2 * limits.max_calls_per_peer
        self._silence = 2 * limits.keepalive
        self._on_lost = on_lost
        self._current: dict[PeerId, ManagedConnection] = {}
        self._all: set[ManagedConnection] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self.refused_channels = 0
        """Channels of peers that had too many."""

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether no peer should be answered any more."""
        return len(self._all) >= self._max_connections

    def get(self, peer: PeerId) -> ManagedConnection | None:
        """The connection on which new channels to ``peer`` are opened."""
        return self._current.get(peer)

    def current(self) -> list[ManagedConnection]:
        """The connections for new channels, one for each peer."""
        return list(self._current.values())

    def of_negotiation(self, negotiation_id: bytes) -> ManagedConnection | None:
        """The one that was made in this negotiation."""
        return next((managed for managed in self._all if managed.negotiation_id == negotiation_id), None)

    def add(self, managed: ManagedConnection) -> None:
        """``managed`` is connected."""
        loop = asyncio.get_running_loop()
        managed.idle_since = loop.time()
        self._all.add(managed)
        self._make_evictable(managed)
        before, self._current[managed.peer] = self._current.get(managed.peer), managed
        if before and not before.channels:
            self.drop(before, "there is a newer one")
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep)

    def add_channel(self, managed: ManagedConnection, channel: DataChannel) -> ChannelTransport | None:
        """A byte transport over ``channel``; None, and the channel closed, when the peer has too many."""
        if len(managed.channels) >= self._max_channels:
            self.refused_channels += 1
            channel.close()
            return None
        transport = ChannelTransport(
            channel, lambda: managed.connection.path, lambda ended: self._channel_ended(managed, ended)
        )
        managed.channels.add(transport)
        if managed.sockets:
            managed.sockets.keep()
        return transport

    def _make_evictable(self, managed: ManagedConnection) -> None:
        if managed.sockets:
            managed.sockets.evictable(lambda: self.drop(managed, "others need the room"))

    def path_changed(self, managed: ManagedConnection) -> None:
        """Its bytes travel by another path from now on."""
        logger.info("another path to %s: %s", short(managed.peer), managed.connection.path)
        for channel in managed.channels:
            channel.path_changed()

    def drop(self, managed: ManagedConnection, reason: str) -> None:
        """Close ``managed``, which is lost or of no use any more. Harmless when repeated."""
        if self._current.get(managed.peer) is managed:
            del self._current[managed.peer]
            logger.info("the connection to %s is gone: %s", short(managed.peer), reason)
        self._all.discard(managed)
        self._on_lost(managed)
        for channel in tuple(managed.channels):
            managed.channels.discard(channel)
            channel.abort()
        closing = asyncio.create_task(managed.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closed)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (exc := closing.exception()):
            logger.error("a connection was not closed in order", exc_info=exc)

    def _channel_ended(self, managed: ManagedConnection, channel: ChannelTransport) -> None:
        """A channel that received nothing for long was cut for that; if no other does, the peer is gone."""
        if channel not in managed.channels:
            return
        now = asyncio.get_running_loop().time()
        silence = managed.silent_for(now)
        managed.channels.discard(channel)
        managed.idle_since = now
        if silence > self._silence:
            self.drop(managed, "the peer is silent")
        elif not managed.channels and self._current.get(managed.peer) is not managed:
            self.drop(managed, "there is a newer one")
        elif not managed.channels:
            self._make_evictable(managed)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for managed in tuple(self._all):
            if not managed.channels and loop.time() - managed.idle_since >= IDLE_SECONDS:
                self.drop(managed, "it was idle")
        self._sweeper = loop.call_later(IDLE_SECONDS / 3, self._sweep) if self._all else None

    async def close(self) -> None:
        """Close all, and wait for those that are being closed."""
        if self._sweeper:
            self._sweeper.cancel()
        closing, self._all = self._all, set()
        for managed in closing:
            self._on_lost(managed)
        self._current.clear()
        await asyncio.gather(*(managed.close() for managed in closing), *self._closing)


_CLOSE_SECONDS = 5.0


@attrs.frozen(eq=False)
class _Attempt:
    task: asyncio.Task[ManagedConnection]
    began: float


class DialSync:
    """Runs ``dial``, which gives up by itself after ``timeout`` seconds, once for each peer and service.

    An attempt goes on when those who wait for it stop waiting. One that has used up half its time is left to
    those who wait for it already: whoever comes then begins another.
    """

    def __init__(
        self, dial: Callable[[PeerId, ServiceAddress], Coroutine[Any, Any, ManagedConnection]], timeout: float
    ) -> None:
        self._dial = dial
        self._timeout = timeout
        self._latest: dict[tuple[PeerId, ServiceAddress], _Attempt] = {}
        self._running: set[asyncio.Task[ManagedConnection]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    async def dial(self, peer: PeerId, service: ServiceAddress) -> ManagedConnection:
        """A connection to ``peer`` by ``service``. Raise what ``dial`` raises, and
        `StreamClosedError` after `close`."""
        task = self._attempt(peer, service).task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            if self._closed and task.cancelled():  # not by who waits here
                raise StreamClosedError("this transport is closed") from exc
            raise
        except SwarmError as exc:
            if self._closed:
                raise StreamClosedError("this transport is closed") from exc
            # For each who waits, with a traceback of its own.
            raise type(exc)(exc.message, **exc.details) from exc

    def _attempt(self, peer: PeerId, service: ServiceAddress) -> _Attempt:
        key, now = (peer, service), asyncio.get_running_loop().time()
        attempt = self._latest.get(key)
        if attempt is None or now - attempt.began > self._timeout / 2:
            attempt = _Attempt(asyncio.create_task(self._dial(peer, service)), now)
            self._latest[key] = attempt
            self._running.add(attempt.task)
            attempt.task.add_done_callback(lambda task: self._ended(key, task))
        return attempt

    def _ended(self, key: tuple[PeerId, ServiceAddress], task: asyncio.Task[ManagedConnection]) -> None:
        self._running.discard(task)
        if (latest := self._latest.get(key)) and latest.task is task:
            del self._latest[key]
        if not task.cancelled():
            task.exception()  # seen here: nobody may wait any more

    async def close(self) -> None:
        """Give up all attempts."""
        self._closed = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
