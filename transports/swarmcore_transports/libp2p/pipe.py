"""A libp2p stream as asyncio sees it: a byte pipe with the interface of an `asyncio.Transport`.

Two tasks in trio move the bytes. Counters that only one side writes tell the other how far it is, so that the
threads wake each other only when somebody waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, cast

import trio
from libp2p.abc import INetStream
from libp2p.network.stream.net_stream import NetStream

from swarmcore.transport import Buffer
from swarmcore_transports.framed.connection_manager import feed_protocol
from swarmcore_transports.libp2p.patches.yamux import LARGEST_PAYLOAD, silent_for
from swarmcore_transports.libp2p.translation import translated
from swarmcore_transports.libp2p.trio_thread import TrioThread

_MAX_WRITE = 2 * LARGEST_PAYLOAD
"""Most bytes written to the muxer at a time."""

_READ_AHEAD = 1024 * 1024
"""Bytes that may wait for asyncio before the stream is read no further."""

_READ = 256 * 1024
_FLUSH_SECONDS = 2.0


class StreamPipe(asyncio.Transport):
    """``stream`` belongs to the pipe from now on. `start` begins to move bytes.

    ``path`` says how they travel, as `Stream.path` does; ``released`` is set once the stream is let go. When
    the pipe is aborted after ``silence`` seconds without a byte from the peer, and no byte of another stream
    has come either, the connection below is dropped with it: nobody answers there.
    """

    def __init__(
        self, thread: TrioThread, stream: INetStream, path: str, released: trio.Event, *, silence: float
    ) -> None:
        super().__init__()
        self._thread = thread
        self._stream = stream
        # Bytes go straight to the muxer: what is in between takes a lock for each read and write.
        self._muxed = cast(NetStream, stream).muxed_stream
        self._path = path
        self._released = released
        self._silence = silence
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BufferedProtocol | None = None
        self._last_received_at = self._loop.time()
        self._closing = False
        # Out. asyncio adds to the queue and to `_queued`, trio takes and adds to `_written`.
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._written = 0
        self._high_water = 512 * 1024
        self._writing_paused = False
        self._writer_waits = False
        self._something_to_write = trio.Event()
        # In. trio adds to `_received`, asyncio to `_delivered`.
        self._received = 0
        self._delivered = 0
        self._reader_waits = False
        self._room_to_read = trio.Event()
        self._reading_paused = False
        self._undelivered: deque[bytes] = deque()
        self._peer_ended = False
        self._was_silent = False
        self._reader_scope = trio.CancelScope()

    def start(self, protocol: asyncio.BufferedProtocol) -> None:
        """Connect ``protocol`` and begin to move bytes."""
        self._protocol = protocol
        protocol.connection_made(self)
        self._thread.start_soon(self._run)

    # --- the asyncio side: asyncio.Transport ----------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._path if name == "path" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.BufferedProtocol, protocol)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_water = 512 * 1024 if high is None else high

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Buffer) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        if self._closing:
            return
        data = b"".join(list_of_data)
        self._queue.append(data)
        self._queued += len(data)
        if self._writer_waits:
            self._writer_waits = False
            self._thread.call_soon_trio(self._wake_writer)
        if not self._writing_paused and self._queued - self._written > self._high_water:
            self._writing_paused = True
            if self._protocol:
                self._protocol.pause_writing()
            if self._queued - self._written <= self._high_water:  # the writer may have looked just before
                self._resume_writing()

    def _resume_writing(self) -> None:
        if self._writing_paused and self._queued - self._written <= self._high_water:
            self._writing_paused = False
            if self._protocol:
                self._protocol.resume_writing()

    def pause_reading(self) -> None:
        """Keep what comes; once `_READ_AHEAD` bytes wait, the peer is made to wait as well."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._deliver_all()

    def close(self) -> None:
        """Close once everything is written; the protocol hears of it at once."""
        self._close_soon()

    def abort(self) -> None:
        """Let go at once. What is still queued leaves only if that is little and goes quickly."""
        if not self._closing:
            self._was_silent = self._loop.time() - self._last_received_at > self._silence
            if self._was_silent or self._queued - self._written > _MAX_WRITE:
                self._queue.clear()
        self._close_soon()

    def _close_soon(self) -> None:
        if not self._closing:
            self._closing = True
            if self._protocol is None:
                self._thread.start_soon(self._release)
            else:
                self._thread.call_soon_trio(self._begin_close)
                self._loop.call_soon(self._connection_lost, None)

    def _received_bytes(self, data: bytes) -> None:
        self._last_received_at = self._loop.time()
        self._undelivered.append(data)
        self._deliver_all()

    def _deliver_all(self) -> None:
        while self._undelivered and not self._reading_paused:
            data = self._undelivered.popleft()
            self._delivered += len(data)
            rest = feed_protocol(data, self._receiving_protocol)
            if rest and self._protocol is not None and not self._closing:  # it has paused
                self._undelivered.appendleft(rest)
                self._delivered -= len(rest)
                return
        if self._reader_waits and self._received - self._delivered <= _READ_AHEAD // 2:
            self._reader_waits = False
            self._thread.call_soon_trio(self._wake_reader)

        if self._peer_ended and not self._undelivered and not self._closing:
            if self._protocol:
                self._protocol.eof_received()
            self._close_soon()

    def _receiving_protocol(self) -> asyncio.BufferedProtocol | None:
        return None if self._reading_paused or self._closing else self._protocol

    def _ended_by_peer(self) -> None:
        self._peer_ended = True
        self._deliver_all()

    def _connection_lost(self, error: Exception | None) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol:
            protocol.connection_lost(error)
        if not self._closing:
            self._closing = True
            self._thread.call_soon_trio(self._begin_close)

    # --- the trio side --------------------------------------------------------------------------------

    def _wake_writer(self) -> None:
        self._something_to_write.set()

    def _wake_reader(self) -> None:
        self._room_to_read.set()

    def _begin_close(self) -> None:
        self._reader_scope.cancel()
        self._wake_writer()

    async def _run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_all)
                with self._reader_scope:
                    await self._read_all()
                self._wake_writer()
                nursery.cancel_scope.deadline = trio.current_time() + _FLUSH_SECONDS
        finally:
            await self._release()

    async def _release(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _FLUSH_SECONDS):
            try:
                connection = self._stream.muxed_conn
                if self._was_silent and silent_for(connection) > self._silence:
                    await connection.close()
                else:
                    await self._stream.reset()
            except Exception as exc:
                self._thread.call_soon_asyncio(self._connection_lost, translated(exc))
        self._released.set()

    async def _read_all(self) -> None:
        try:
            while data := await self._muxed.read(_READ):
                self._received += len(data)
                self._thread.call_soon_asyncio(self._received_bytes, data)
                while self._received - self._delivered > _READ_AHEAD:
                    self._room_to_read = trio.Event()
                    self._reader_waits = True
                    if self._received - self._delivered > _READ_AHEAD:
                        await self._room_to_read.wait()
            self._thread.call_soon_asyncio(self._ended_by_peer)
        except EOFError:
            self._thread.call_soon_asyncio(self._ended_by_peer)
        except Exception as exc:
            self._thread.call_soon_asyncio(self._connection_lost, translated(exc))

    async def _write_all(self) -> None:
        try:
            while True:
                while self._queue:
                    await self._write(self._next_write())
                    if self._writing_paused and self._queued - self._written <= self._high_water // 2:
                        self._thread.call_soon_asyncio(self._resume_writing)
                if self._closing:
                    return
                self._something_to_write = trio.Event()
                self._writer_waits = True
                if not self._queue and not self._closing:
                    await self._something_to_write.wait()
        except Exception as exc:
            self._thread.call_soon_asyncio(self._connection_lost, translated(exc))

    def _next_write(self) -> bytes:
        """What to write next: one long buffer, or as many short ones as make a piece."""
        data = self._queue.popleft()
        if len(data) >= _MAX_WRITE or not self._queue:
            return data
        batch, size = [data], len(data)
        while self._queue and size + len(self._queue[0]) <= _MAX_WRITE:
            batch.append(self._queue.popleft())
            size += len(batch[-1])
        return b"".join(batch)

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(data), _MAX_WRITE):
            piece = view[start : start + _MAX_WRITE]
            await self._muxed.write(cast(bytes, piece))  # which the muxer copies anyway
            self._written += len(piece)
