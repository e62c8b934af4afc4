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
from swarmcore_transports.webrtc.addresses import Service
from swarmcore_transports.webrtc.channel_transport import ChannelPipe
from swarmcore_transports.webrtc.engine import DataChannel, PeerConnection

logger = logging.getLogger(__name__)

_RESTART_RATE, _RESTART_BURST = 0.5, 8.0

IDLE_SECONDS = 90.0
"""How long a connection without a channel is kept; channels themselves are kept for a minute."""


@attrs.define(eq=False)
class Link:
    """The connection to one peer: being made, or made."""

    peer: PeerId
    connection: PeerConnection
    exchange: bytes
    """The name under which the two sides have signalled, and do so for a new path."""
    dialled: Service | None = None
    """Where this side has met the peer; None when the peer has dialled."""
    sockets: Reservation | None = None
    """The descriptors that ICE takes; it makes room for others while it carries nothing."""
    pipes: set[ChannelPipe] = attrs.field(factory=set)
    idle_since: float = 0.0
    restarting: bool = False
    restarted_at: float = float("-inf")
    limit: TokenBucket = attrs.field(factory=lambda: TokenBucket(_RESTART_RATE, _RESTART_BURST))
    """How often the peer may ask for a new path."""

    async def close(self) -> None:
        """Let go of it all. Harmless when repeated."""
        try:
            await self.connection.close()
        finally:
            if self.sockets:
                self.sockets.release()

    def silent_for(self, now: float) -> float:
        """Seconds without a word from the peer on any channel; 0 when there is no channel to hear it on."""
        return now - max((pipe.heard_at for pipe in self.pipes), default=now)

    def __repr__(self) -> str:
        return f"<Link {short(self.peer)} · {self.connection.path} · {len(self.pipes)} channels>"


class Links:
    """At most one link for each peer is for new channels: the latest. Those before it live as long as their
    channels; one without channels is closed after `IDLE_SECONDS`. ``on_lost`` is told of each that ends.
    """

    def __init__(
        self,
        limits: Limits,
        on_lost: Callable[[Link], None] = lambda link: None,
    ) -> None:
        self._most = limits.max_calls
        self._most_channels = 2 * limits.max_calls_per_peer
        self._silence = 2 * limits.keepalive
        self._on_lost = on_lost
        self._current: dict[PeerId, Link] = {}
        self._all: set[Link] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self.refused_channels = 0
        """Channels of peers that had too many."""

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether no peer should be answered any more."""
        return len(self._all) >= self._most

    def get(self, peer: PeerId) -> Link | None:
        """The link on which new channels to ``peer`` are opened."""
        return self._current.get(peer)

    def current(self) -> list[Link]:
        """The links for new channels, one for each peer."""
        return list(self._current.values())

    def of_exchange(self, name: bytes) -> Link | None:
        """The connected link that was made in the exchange ``name``."""
        return next((link for link in self._all if link.exchange == name), None)

    def add(self, link: Link) -> None:
        """``link`` is connected."""
        loop = asyncio.get_running_loop()
        link.idle_since = loop.time()
        self._all.add(link)
        self._unused(link)
        before, self._current[link.peer] = self._current.get(link.peer), link
        if before and not before.pipes:
            self.lost(before, "there is a newer one")
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep)

    def pipe(self, link: Link, channel: DataChannel) -> ChannelPipe | None:
        """A pipe over ``channel`` of ``link``; None, and the channel closed, when the peer has too many."""
        if len(link.pipes) >= self._most_channels:
            self.refused_channels += 1
            channel.close()
            return None
        pipe = ChannelPipe(channel, lambda: link.connection.path, lambda ended: self._pipe_ended(link, ended))
        link.pipes.add(pipe)
        if link.sockets:
            link.sockets.keep()
        return pipe

    def _unused(self, link: Link) -> None:
        if link.sockets:
            link.sockets.evictable(lambda: self.lost(link, "others need the room"))

    def moved(self, link: Link) -> None:
        """The bytes of ``link`` travel another way from now on."""
        logger.info("another path to %s: %s", short(link.peer), link.connection.path)
        for pipe in link.pipes:
            pipe.path_changed()

    def lost(self, link: Link, reason: str) -> None:
        """``link`` is of no use any more: end what goes over it. Harmless when repeated."""
        if self._current.get(link.peer) is link:
            del self._current[link.peer]
            logger.info("the connection to %s is gone: %s", short(link.peer), reason)
        self._all.discard(link)
        self._on_lost(link)
        for pipe in tuple(link.pipes):
            link.pipes.discard(pipe)
            pipe.abort()
        closing = asyncio.create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closed)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (exc := closing.exception()):
            logger.error("a connection was not closed in order", exc_info=exc)

    def _pipe_ended(self, link: Link, pipe: ChannelPipe) -> None:
        """A pipe that long heard nothing was cut for that; if no other hears the peer, nobody is there."""
        if pipe not in link.pipes:
            return
        now = asyncio.get_running_loop().time()
        silence = link.silent_for(now)
        link.pipes.discard(pipe)
        link.idle_since = now
        if silence > self._silence:
            self.lost(link, "the peer is silent")
        elif not link.pipes and self._current.get(link.peer) is not link:
            self.lost(link, "there is a newer one")
        elif not link.pipes:
            self._unused(link)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for link in tuple(self._all):
            if not link.pipes and loop.time() - link.idle_since >= IDLE_SECONDS:
                self.lost(link, "it was idle")
        self._sweeper = loop.call_later(IDLE_SECONDS / 3, self._sweep) if self._all else None

    async def close(self) -> None:
        """Close all, and wait for those that are being closed."""
        if self._sweeper:
            self._sweeper.cancel()
        links, self._all = self._all, set()
        for link in links:
            self._on_lost(link)
        self._current.clear()
        await asyncio.gather(*(link.close() for link in links), *self._closing)


_CLOSE_SECONDS = 5.0


@attrs.frozen(eq=False)
class _Attempt:
    task: asyncio.Task[Link]
    began: float


class Dials:
    """Runs ``dial``, which gives up by itself after ``timeout`` seconds, once for each peer and service.

    An attempt goes on when those who wait for it stop waiting. One that has used up half its time is left to
    those who wait for it already: whoever comes then begins another.
    """

    def __init__(self, dial: Callable[[PeerId, Service], Coroutine[Any, Any, Link]], timeout: float) -> None:
        self._dial = dial
        self._timeout = timeout
        self._latest: dict[tuple[PeerId, Service], _Attempt] = {}
        self._running: set[asyncio.Task[Link]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    async def link_to(self, peer: PeerId, service: Service) -> Link:
        """A link to ``peer``, who is met at ``service``. Raise what ``dial`` raises, and
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

    def _attempt(self, peer: PeerId, service: Service) -> _Attempt:
        key, now = (peer, service), asyncio.get_running_loop().time()
        attempt = self._latest.get(key)
        if attempt is None or now - attempt.began > self._timeout / 2:
            attempt = _Attempt(asyncio.create_task(self._dial(peer, service)), now)
            self._latest[key] = attempt
            self._running.add(attempt.task)
            attempt.task.add_done_callback(lambda task: self._ended(key, task))
        return attempt

    def _ended(self, key: tuple[PeerId, Service], task: asyncio.Task[Link]) -> None:
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
