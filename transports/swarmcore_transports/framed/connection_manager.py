"""All connections of one transport: those that carry a stream, those kept idle, the handlers of streams."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from typing import Generic, TypeVar

from swarmcore.errors import PeerUnreachableError, ResourceLimitError, SwarmError
from swarmcore.resources import ResourceManager
from swarmcore.transport import OnStream, serve_stream
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import RETIRE_SECONDS, Connection
from swarmcore_transports.framed.frames import FrameType, encode_frame
from swarmcore_transports.framed.migration import Migration
from swarmcore_transports.framed.stream import FramedStream

T = TypeVar("T")


class IdlePool(Generic[T]):
    """Idle connections by peer, the most recently used taken first, the oldest given up first.

    A plain object: ``now`` is passed in, and what it gives up is returned for the caller to close.
    """

    def __init__(self, *, per_peer: int, total: int, keep: float) -> None:
        self._per_peer = per_peer
        self._total = total
        self._keep = keep
        self._idle: OrderedDict[T, tuple[PeerId, float]] = OrderedDict()
        self._of_peer: dict[PeerId, list[T]] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def put(self, peer: PeerId, connection: T, now: float) -> list[T]:
        """Keep ``connection``; return those that must go to make memory."""
        self._idle[connection] = (peer, now)
        of_peer = self._of_peer.setdefault(peer, [])
        of_peer.append(connection)
        evicted = []
        if len(of_peer) > self._per_peer:
            evicted.append(of_peer[0])
            self.remove(of_peer[0])
        while len(self._idle) > self._total:
            oldest = next(iter(self._idle))
            evicted.append(oldest)
            self.remove(oldest)
        return evicted

    def take(self, peer: PeerId) -> T | None:
        """The connection to ``peer`` that was used last, no longer kept here."""
        of_peer = self._of_peer.get(peer)
        if not of_peer:
            return None
        connection = of_peer[-1]
        self.remove(connection)
        return connection

    def remove(self, connection: T) -> None:
        """Forget ``connection``, if it is here."""
        entry = self._idle.pop(connection, None)
        if entry is None:
            return
        of_peer = self._of_peer[entry[0]]
        of_peer.remove(connection)
        if not of_peer:
            del self._of_peer[entry[0]]

    def expire(self, now: float) -> list[T]:
        """Forget and return the connections that have been idle for ``keep`` seconds."""
        expired = []
        for connection, (_, since) in self._idle.items():
            if now - since < self._keep:
                break
            expired.append(connection)
        for connection in expired:
            self.remove(connection)
        return expired

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None when nothing is idle."""
        return next((since + self._keep for _, since in self._idle.values()), None)


logger = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0


class ConnectionManager:
    """The `ConnectionOwner` of a transport's connections, dialled and accepted.

    ``stale`` tells of an idle connection that its other side has most likely given up; ``resources`` is asked
    anew each time, as a transport may come to share those of others.
    """

    def __init__(
        self,
        limits: Limits,
        stale: Callable[[Connection], bool],
        resources: Callable[[], ResourceManager],
    ) -> None:
        self._limits = limits
        self._stale = stale
        self._resources = resources
        self._on_stream: OnStream | None = None
        self._all: set[Connection] = set()
        self._dialled: IdlePool[Connection] = IdlePool(per_peer=32, total=256, keep=_IDLE_SECONDS)
        # The dialler decides how long a connection is kept; the listener only bounds their number.
        self._accepted: IdlePool[Connection] = IdlePool(
            per_peer=limits.max_calls_per_peer, total=limits.max_calls, keep=4 * _IDLE_SECONDS
        )
        self._sweeper: asyncio.TimerHandle | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self._incoming: Counter[PeerId] = Counter()
        self._all_lost: asyncio.Future[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._all)

    @property
    def resources(self) -> ResourceManager:
        """What counts the memory, the descriptors and the streams of these connections."""
        return self._resources()

    @property
    def idle(self) -> int:
        """How many carry no stream and are kept for the next one."""
        return len(self._dialled) + len(self._accepted)

    def serve(self, on_stream: OnStream) -> None:
        """From now on, streams that remote peers open go to ``on_stream``."""
        self._on_stream = on_stream

    def take_idle(self, peer: PeerId) -> Connection | None:
        """An idle connection to ``peer`` that this side dialled, ready for another stream."""
        while connection := self._dialled.take(peer):
            if connection.error is None and not self._stale(connection):
                return connection
            connection.retire("the connection was idle")
        return None

    def open_stream(self, connection: Connection, peer: PeerId) -> FramedStream:
        """Open a stream to ``peer`` on a connection that was taken or just dialled.

        Raise `ResourceLimitError` when there is no memory for another one of that peer.
        """
        if connection.socket:
            connection.socket.keep()
        try:
            stream = FramedStream(connection, peer, self._limits, self.resources)
        except ResourceLimitError:
            connection.retire("there is no memory for another stream")
            raise
        connection.write(encode_frame(FrameType.OPEN))
        return stream

    def accept_stream(self, connection: Connection) -> None:
        """The remote has opened a stream on a connection that it dialled: handle it in a task of its own."""
        remote = connection.remote
        assert remote and self._on_stream
        self._accepted.remove(connection)
        if connection.socket:
            connection.socket.keep()
        # Whoever handles streams refuses those above its limit with a proper answer; this is for floods.
        if self._incoming[remote] >= 2 * self._limits.max_calls_per_peer or (
            len(self._handlers) >= 2 * self._limits.max_calls
        ):
            connection.retire("too many streams; close some first")
            return
        try:
            stream = FramedStream(connection, remote, self._limits, self.resources)
        except ResourceLimitError as exc:
            connection.retire(exc.message)
            return
        task = asyncio.get_running_loop().create_task(self._handle(stream, self._on_stream))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, stream: FramedStream, on_stream: OnStream) -> None:
        self._incoming[stream.remote] += 1
        try:
            await serve_stream(stream, on_stream)
        finally:
            self._incoming[stream.remote] -= 1
            if not self._incoming[stream.remote]:
                del self._incoming[stream.remote]

    # --- what a connection tells its owner ------------------------------------------------------------

    def connection_made(self, connection: Connection) -> None:
        self._all.add(connection)
        if self._closed:
            connection.fail(PeerUnreachableError("the transport was closed"))

    def connection_idle(self, connection: Connection) -> None:
        if self._closed or connection.error or connection.remote is None:
            return
        pool = self._accepted if connection.accepts else self._dialled
        loop = asyncio.get_running_loop()
        for evicted in pool.put(connection.remote, connection, loop.time()):
            _close_idle(evicted)
        if connection.socket:
            connection.socket.evictable(partial(_evict, connection))
        if self._sweeper is None:
            self._sweeper = loop.call_later(_IDLE_SECONDS, self._sweep)

    def connection_lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection.socket:
            connection.socket.release()
        self._dialled.remove(connection)
        self._accepted.remove(connection)
        if not self._all and self._all_lost and not self._all_lost.done():
            self._all_lost.set_result(None)

    def migration_requested(self, connection: Connection, token: bytes) -> None:
        for other in self._all:
            if (
                other.accepts
                and other.remote == connection.remote
                and other.token
                and hmac.compare_digest(other.token, token)
                and other.error is None
                and other.migration is None
            ):
                connection.write(encode_frame(FrameType.RESUME))
                other.migration = Migration(other, connection.give_up_transport())
                return
        connection.retire("there is no such connection to go on with")

    def relayed_to(self, peer: PeerId) -> list[Connection]:
        """Connections that this side dialled and that carry a stream to ``peer`` over a relay.

        Those that carry none are retired.
        """
        found = [
            connection
            for connection in self._all
            if not connection.accepts
            and connection.remote == peer
            and connection.path == "relayed"
            and connection.error is None
        ]
        for connection in found:
            if connection.stream is None:
                connection.retire("there is a direct path now")
        return [connection for connection in found if connection.stream]

    async def migrate(self, connection: Connection, fresh: Connection) -> None:
        """Let the transport of ``fresh``, just dialled to the same peer, carry ``connection`` from now on.

        What goes wrong before the peer has agreed leaves ``connection`` where it is.
        """
        fresh.write(encode_frame(FrameType.RESUME, connection.token))
        await fresh.resumed
        if connection.error or connection.migration or connection.stream is None:
            fresh.retire("the connection is gone")
            return
        connection.migration = migration = Migration(connection, fresh.give_up_transport())
        migration.switch()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for pool in (self._dialled, self._accepted):
            for connection in pool.expire(loop.time()):
                _close_idle(connection)
        self._sweeper = loop.call_later(_IDLE_SECONDS / 2, self._sweep) if self.idle else None

    # --- the end --------------------------------------------------------------------------------------

    def fail_all(self, error: SwarmError) -> None:
        """Cut every connection at once; what uses them raises ``error``."""
        for connection in tuple(self._all):
            connection.fail(error)

    def begin_close(self) -> None:
        """Retire every connection and cancel every handler; new connections fail at once."""
        self._closed = True
        if self._sweeper:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in tuple(self._all):
            # Nobody waits for the reason on an idle one.
            connection.retire("the transport was closed", patience=None if connection.stream else 0.0)
        for task in self._handlers:
            task.cancel()

    async def finish_close(self, others: Collection[asyncio.Task[None]] = ()) -> None:
        """Wait, for seconds at most, until the handlers and ``others`` are done and no connection is left."""
        tasks = {*others, *self._handlers} - {asyncio.current_task()}
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=RETIRE_SECONDS)
            if self._all:
                # Each one cuts itself off when the other side does not let go in time.
                self._all_lost = asyncio.get_running_loop().create_future()
                async with asyncio.timeout(2 * RETIRE_SECONDS):
                    await self._all_lost
        except TimeoutError:
            logger.warning("%d connections are still open", len(self._all))
        finally:
            for connection in tuple(self._all):
                connection.fail(PeerUnreachableError("the transport was closed"))


def _evict(idle: Connection) -> None:
    idle.retire("the peer needs memory for others", patience=0.0)


def _close_idle(idle: Connection) -> None:
    if idle.accepts:
        idle.dismiss()
    else:
        idle.retire("the connection was idle")


def feed_protocol(data: bytes, reader: Callable[[], asyncio.BufferedProtocol | None]) -> bytes:
    """Give ``data`` to the protocol that ``reader`` names before each piece; return what is not taken.

    A protocol may pause reading, give the transport away or close it in the midst of this; ``reader``
    then names another one, or None.
    """
    rest = memoryview(data)
    while rest and (protocol := reader()) is not None:
        # Released before the next is asked for: a bytearray with a memoryview on it cannot grow.
        with memoryview(protocol.get_buffer(len(rest))) as buffer:
            taken = min(len(buffer), len(rest))
            buffer[:taken] = rest[:taken]
        rest = rest[taken:]
        protocol.buffer_updated(taken)
    return bytes(rest)
