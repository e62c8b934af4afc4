"""Yamux as py-libp2p has it, with one task that writes all frames.

py-libp2p writes from whichever task has something to say. So its reader, which answers pings and opened
streams, waits for the peer to read, and two peers that send much to each other both stop for good; and a
write that is cancelled leaves half a frame behind, which ends every stream of the connection. The frames are
those of https://github.com/hashicorp/yamux/blob/master/spec.md.
"""

from __future__ import annotations

import logging
import math
import struct
from collections import deque
from typing import Any, ClassVar, cast
from weakref import WeakSet

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux, YamuxStream

from swarmcore.types import short
from swarmcore.wire.limits import Limits

logger = logging.getLogger(__name__)

YAMUX = TProtocol(PROTOCOL_ID)

_NOISE_MESSAGE = 65_519
"""Most bytes that one message of Noise holds."""

_BATCH = 2 * _NOISE_MESSAGE
"""Bytes of frames that are encrypted and written together."""

_HEADER = struct.Struct("!BBHII")
LARGEST_PAYLOAD = _BATCH - _HEADER.size
"""Most bytes of one stream that are sent in one frame: 64 KB messages fit, with what is around them."""

_DATA, _PING, _GO_AWAY = 0, 2, 3
_SYN = 1

_DATA_BUFFER = 256 * 1024
"""Bytes of streams that wait for the socket before writers wait as well."""

_CONTROL_BUFFER = 64 * 1024
"""Bytes of answers to the peer (to pings, to opened streams) that may wait until it reads them."""

_MAX_UNREAD = 32 * 2**20
"""Bytes of one connection that nobody here has read yet, before no more is taken from the peer."""

_MAX_FRAME = 2**20
"""Most bytes of a frame that is taken from a peer: py-libp2p takes 16 MiB, those of its kind send 64 KiB."""

_MAX_UNREAD_IN_ALL = 256 * 2**20
"""Unread bytes of all connections of the process, above which each may have `_UNREAD_PER_CONNECTION`."""

_UNREAD_PER_CONNECTION = 2**20

_MAX_OUTGOING_STREAMS = 4096
_FLUSH_SECONDS = 1.0
_SILENT_TICKS = 3

SILENT_KEEPALIVES = 1.5
"""Times `Limits.keepalive` without a word before nothing new is begun; a peer that lives is heard in each."""


class _WakingAttribute:
    """An attribute that py-libp2p sets on a stream, as a window that grows, and that wakes its writers."""

    def __set_name__(self, owner: type[PatientStream], name: str) -> None:
        self._name = name

    def __get__(self, stream: PatientStream, owner: type[PatientStream]) -> Any:
        return stream.__dict__[self._name]

    def __set__(self, stream: PatientStream, value: Any) -> None:
        stream.__dict__[self._name] = value
        if "_changed" in stream.__dict__:
            stream._changed.unpark_all()


class PatientStream(YamuxStream):
    """Waits for its window as long as it takes; py-libp2p resets a stream after five seconds of that."""

    send_window = _WakingAttribute()
    send_closed = _WakingAttribute()
    closed = _WakingAttribute()

    @classmethod
    def from_stream(cls, stream: YamuxStream) -> PatientStream:
        """``stream`` itself, turned into one of these: py-libp2p makes it in the midst of its reading."""
        stream.__class__ = cls
        patient = cast(PatientStream, stream)
        patient._changed = trio.lowlevel.ParkingLot()
        return patient

    _changed: trio.lowlevel.ParkingLot

    async def write(self, data: bytes) -> None:
        """Repairs: gives up after five seconds, and polls the window a hundred times a second till then."""
        at = 0
        while at < len(data):
            while self.send_window <= 0 and not (self.closed or self.send_closed):
                await self._changed.park()
            if self.closed or self.send_closed:
                raise MuxedStreamError("the stream is closed")
            size = min(self.send_window, LARGEST_PAYLOAD, len(data) - at)
            self.send_window -= size
            header = _HEADER.pack(0, _DATA, 0, self.stream_id, size)
            await self.conn._write_frame(header + data[at : at + size])
            at += size

    async def read(self, n: int | None = -1) -> bytes:
        """Adds: a connection that takes no more for now hears that something has been read."""
        data = await super().read(n)
        cast(QueuedYamux, self.conn).notify_read()
        return data

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        """Repairs: grants what was read each time, a frame for each message; half a window is soon enough."""
        unread = len(self.conn.stream_buffers.get(self.stream_id, b""))
        if self.target_recv_window - self.recv_window - unread >= self.target_recv_window // 2:
            await super()._auto_tune_and_send_window_update()

    async def reset(self) -> None:
        """Repairs: what nobody will read any more is kept for a minute."""
        await super().reset()
        if unread := self.conn.stream_buffers.get(self.stream_id):
            unread.clear()
            await self.conn._finalize_stream(self, fully_closed=True)
        cast(QueuedYamux, self.conn).notify_read()


class QueuedYamux(Yamux):
    """One connection. The peer is lost when it has been silent for three times `Limits.keepalive`."""

    _all: ClassVar[WeakSet[QueuedYamux]] = WeakSet()

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, limits: Limits) -> None:
        self._timed_connection = _TimedConnection(secured_conn)
        super().__init__(cast(ISecureConn, self._timed_connection), peer_id, secured_conn.is_initiator)
        # Of which the library has 256, and whoever needs one more waits without a deadline.
        self.stream_backlog_semaphore = trio.Semaphore(_MAX_OUTGOING_STREAMS)
        self._keepalive = limits.keepalive
        self._max_incoming_streams = 4 * limits.max_calls_per_peer
        self._frames: deque[bytes] = deque()
        self._data_bytes = self._control_bytes = 0
        self._writing = False
        self._something_to_write = trio.lowlevel.ParkingLot()
        self._buffer_space = trio.lowlevel.ParkingLot()
        self._all_written = trio.lowlevel.ParkingLot()
        self._read_notification = trio.lowlevel.ParkingLot()
        self._reading = trio.CancelScope()
        self._all.add(self)

    async def start(self) -> None:
        """Adds: the task that writes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_queue)
            await super().start()
            nursery.cancel_scope.cancel()

    async def handle_incoming(self) -> None:
        """Adds: another task may end it; the library reads on when it cannot write any more."""
        with self._reading:
            await super().handle_incoming()
        if self._reading.cancelled_caught:
            await self._cleanup_on_error()

    def _disconnect(self, reason: str) -> None:
        if not self.event_shutting_down.is_set():
            logger.info("dropping the connection to %s: %s", short(str(self.peer_id)), reason)
            self._reading.cancel()

    # --- streams --------------------------------------------------------------------------------------

    async def open_stream(self) -> YamuxStream:
        """Adds: patience."""
        return PatientStream.from_stream(await super().open_stream())

    async def accept_stream(self) -> IMuxedStream:
        """Adds: patience, and a bound on the streams that a peer has open."""
        while True:
            stream = PatientStream.from_stream(cast(YamuxStream, await super().accept_stream()))
            if sum(not one.is_initiator for one in self.streams.values()) <= self._max_incoming_streams:
                return stream
            logger.info("%s opens too many streams; one was reset", short(str(self.peer_id)))
            await stream.reset()

    # --- out ------------------------------------------------------------------------------------------

    async def _write_frame(self, data: bytes) -> None:
        """Repairs: writes at once and in the task that calls. Data waits for room, all else never waits.

        Frames keep their order, since the end of a stream must not overtake its data.
        """
        kind = data[1]
        while kind == _DATA and self._data_bytes >= _DATA_BUFFER and not self.event_shutting_down.is_set():
            await self._buffer_space.park()
        if self._control_bytes > _CONTROL_BUFFER:
            self._disconnect("it does not read the answers to what it asks")
        if self.event_shutting_down.is_set() or self._control_bytes > _CONTROL_BUFFER:
            raise ConnectionClosedError("the connection is closed")
        self._count(data, len(data))
        self._frames.append(data)
        self._something_to_write.unpark()
        if kind == _GO_AWAY:  # the socket is closed next, and what is still here would be lost
            with trio.move_on_after(_FLUSH_SECONDS):
                while self._frames or self._writing:
                    await self._all_written.park()
        await trio.lowlevel.checkpoint()

    def _count(self, frame: bytes, size: int) -> None:
        if frame[1] == _DATA:
            self._data_bytes += size
        else:
            self._control_bytes += size

    async def _write_queue(self) -> None:
        try:
            while True:
                self._all_written.unpark_all()
                while not self._frames:
                    await self._something_to_write.park()
                self._writing = True
                while self._frames:
                    await self.secured_conn.write(self._next_batch())
                    if self._data_bytes < _DATA_BUFFER:
                        self._buffer_space.unpark_all()
                self._writing = False
        except Exception as exc:
            self._disconnect(f"it cannot be written to: {exc!r}")
        finally:
            self._writing = False
            self._frames.clear()
            self._buffer_space.unpark_all()
            self._all_written.unpark_all()

    def _next_batch(self) -> bytes:
        """As many frames as are written together."""
        batch: list[bytes] = []
        size = 0
        while self._frames and (not batch or size + len(self._frames[0]) <= _BATCH):
            frame = self._frames.popleft()
            self._count(frame, -len(frame))
            batch.append(frame)
            size += len(frame)
        return batch[0] if len(batch) == 1 else b"".join(batch)

    # --- in -------------------------------------------------------------------------------------------

    async def _read_data_body(self, length: int) -> bytes:
        """Adds: back-pressure for the whole connection; a peer may ignore the windows of its streams."""
        if length > _MAX_FRAME:
            logger.info("%s sends a frame of %d bytes", short(str(self.peer_id)), length)
            raise trio.TooSlowError  # for which the library closes the connection
        with trio.move_on_after(2 * self._keepalive) as patience:
            while (unread := self._unread) and unread + length > self._most_unread(unread):
                await self._read_notification.park()
        if patience.cancelled_caught:
            logger.info("%s has sent %d bytes that nobody reads", short(str(self.peer_id)), self._unread)
            raise trio.TooSlowError
        return await super()._read_data_body(length)

    @property
    def _unread(self) -> int:
        return sum(map(len, self.stream_buffers.values()))

    def _most_unread(self, unread: int) -> int:
        """How much of this connection, of which ``unread`` bytes wait now, may wait before it is read on."""
        if unread <= _UNREAD_PER_CONNECTION // 2:
            return _MAX_UNREAD  # a busy connection is not slowed down by counting what others hold
        in_all = sum(connection._unread for connection in self._all if not connection.is_closed)
        return _MAX_UNREAD if in_all < _MAX_UNREAD_IN_ALL else _UNREAD_PER_CONNECTION

    def notify_read(self) -> None:
        """Called by a stream when some of what has come was taken."""
        self._read_notification.unpark_all()

    # --- signs of life --------------------------------------------------------------------------------

    @property
    def is_silent(self) -> bool:
        return self.silent_for > SILENT_KEEPALIVES * self._keepalive

    @property
    def silent_for(self) -> float:
        return trio.current_time() - self._timed_connection.last_read_at

    async def _measure_rtt_loop(self) -> None:
        """Repairs: pings each half minute, and lets a peer live that never answers.

        Ticks are counted, as in `framed`: a process that was stopped does not take that for the peer's
        silence. Any byte counts, since where the way is full, the answer to a ping comes late.
        """
        silent_ticks, last_read_at = 0, self._timed_connection.last_read_at
        answered = self._ping_event
        answered.set()
        while not self.event_shutting_down.is_set():
            if answered.is_set():
                self._ping_id = (self._ping_id + 1) % 2**32
                answered = self._ping_event = trio.Event()
                self._ping_sent_time = trio.current_time()
                try:
                    await self._write_frame(_HEADER.pack(0, _PING, _SYN, 0, self._ping_id))
                except ConnectionClosedError:
                    return
            with trio.move_on_after(self._keepalive):
                await self.event_shutting_down.wait()
            silent_ticks = silent_ticks + 1 if self._timed_connection.last_read_at == last_read_at else 0
            last_read_at = self._timed_connection.last_read_at
            if silent_ticks >= _SILENT_TICKS:
                self._disconnect(f"it has been silent for {silent_ticks * self._keepalive:g} s")
                return


def silent_for(connection: IMuxedConn) -> float:
    """Seconds since anything has come over ``connection``; a peer that lives answers pings."""
    if isinstance(connection, QueuedYamux):
        return connection.silent_for
    return math.inf  # the library's own does not say


def is_silent(connection: IMuxedConn) -> bool:
    """Whether nothing has come over ``connection`` for so long that it had better not be used any more."""
    return isinstance(connection, QueuedYamux) and connection.is_silent


class _TimedConnection:
    """A secured connection, and when anything last came over it."""

    def __init__(self, secured_conn: ISecureConn) -> None:
        self._secured_conn = secured_conn
        self.last_read_at = trio.current_time()

    async def read(self, n: int | None = None) -> bytes:
        data = await self._secured_conn.read(n)
        self.last_read_at = trio.current_time()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._secured_conn, name)


class QueuedMuxer(MuxerMultistream):
    """Agrees on yamux, and makes it `QueuedYamux`; the library's own makes `Yamux` whatever it was given."""

    def __init__(self, limits: Limits) -> None:
        super().__init__({YAMUX: QueuedYamux}, max(1, int(limits.connect_timeout)))
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Repairs: the class of connections is written into the library's."""
        await self.select_transport(conn)
        return self._annotate_connection(QueuedYamux(conn, peer_id, self._limits), conn, YAMUX)


_METHODS = {
    Yamux: "start handle_incoming open_stream accept_stream _write_frame _read_data_body _cleanup_on_error "
    "_measure_rtt_loop _finalize_stream",
    YamuxStream: "read write reset _auto_tune_and_send_window_update",
    MuxerMultistream: "select_transport _annotate_connection",
}
_ATTRIBUTES = (
    "secured_conn peer_id streams stream_buffers stream_backlog_semaphore event_shutting_down _ping_event "
    "_ping_id _ping_sent_time"
)
_STREAM_ATTRIBUTES = (
    "conn stream_id is_initiator send_window send_closed closed recv_window target_recv_window"
)


def missing_attributes(swarm: Swarm) -> list[str]:
    """What the classes above rely on and this version of the library does not have."""
    found = [
        f"{one.__name__}.{name}"
        for one, names in _METHODS.items()
        for name in names.split()
        if not callable(getattr(one, name, None))
    ]
    try:
        connection = Yamux(cast(ISecureConn, None), ID(b""), True)
        stream = YamuxStream(1, connection, True)
    except Exception as exc:
        return [*found, f"Yamux of the known shape ({exc!r})"]
    found += [f"Yamux.{name}" for name in _ATTRIBUTES.split() if not hasattr(connection, name)]
    found += [f"YamuxStream.{name}" for name in _STREAM_ATTRIBUTES.split() if not hasattr(stream, name)]
    if not hasattr(getattr(swarm, "upgrader", None), "muxer_multistream"):
        found.append("Swarm.upgrader.muxer_multistream")
    return found
