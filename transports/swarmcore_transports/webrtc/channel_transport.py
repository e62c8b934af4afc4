"""A data channel as an `asyncio.Transport` of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

from swarmcore.transport import Buffer
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import feed_protocol
from swarmcore_transports.webrtc.engine import DataChannel

_PIECE = 32 * 1024
"""Bytes of one message of the channel: what every implementation takes, and a browser gets in one event."""

_MESSAGE_BYTES = 64
"""What a message of the channel takes besides its bytes: a flood of short ones is bounded too."""

_MAX_UNDELIVERED = 16 * 2**20
"""Bytes that may wait while reading is paused; a peer that keeps to its credit never comes near."""


class ChannelTransport(asyncio.Transport):
    """``channel`` is open and belongs to the transport from now on; `start` begins to move bytes.

    A data channel never pushes back, neither way (W3C's API has no means to). Writing pauses by its buffered
    amount; reading relies on the credit that the streams above grant.
    """

    def __init__(
        self, channel: DataChannel, path: Callable[[], str], on_end: Callable[[ChannelTransport], None]
    ) -> None:
        super().__init__()
        self._channel = channel
        self._path = path
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BufferedProtocol | None = None
        self._high_water = 512 * 1024
        self._closing = False
        self._writing_paused = False
        self._reading_paused = True  # until it starts
        self._undelivered: deque[bytes] = deque()
        self._waiting = 0
        self._peer_ended = False
        self.heard_at = self._loop.time()
        """When the peer was last heard on this channel, on the loop's clock."""
        channel.set_handler(self)

    def start(self, protocol: asyncio.BufferedProtocol) -> None:
        """Connect ``protocol`` and begin to move bytes."""
        self._protocol = protocol
        protocol.connection_made(self)
        self.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._path() if name == "path" else default

    def path_changed(self) -> None:
        """The bytes travel by another path from now on."""
        if isinstance(self._protocol, Connection):
            self._protocol.path_changed()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.BufferedProtocol, protocol)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_water = 512 * 1024 if high is None else high
        self._channel.set_low_threshold(self._high_water // 2)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Buffer) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        if self._closing or self._peer_ended:
            return
        data = b"".join(list_of_data)
        for start in range(0, len(data), _PIECE):
            self._channel.send(data[start : start + _PIECE])
        if not self._writing_paused and self._channel.buffered_amount > self._high_water:
            self._writing_paused = True
            if self._protocol:
                self._protocol.pause_writing()

    def buffered_amount_low(self) -> None:
        """The channel has sent most of what was queued."""
        if self._writing_paused:
            self._writing_paused = False
            if self._protocol:
                self._protocol.resume_writing()

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._deliver()

    def message_received(self, data: bytes) -> None:
        """The channel has brought ``data``."""
        self.heard_at = self._loop.time()
        if self._closing:
            return
        self._undelivered.append(data)
        self._waiting += len(data) + _MESSAGE_BYTES
        self._deliver()
        if self._waiting > _MAX_UNDELIVERED:
            self.abort()

    def _deliver(self) -> None:
        while self._undelivered and not self._reading_paused:
            data = self._undelivered.popleft()
            self._waiting -= len(data) + _MESSAGE_BYTES
            rest = feed_protocol(data, self._reader)
            if rest and self._protocol is not None and not self._closing:  # it has paused
                self._undelivered.appendleft(rest)
                self._waiting += len(rest) + _MESSAGE_BYTES
                return
        if self._peer_ended and not self._undelivered and not self._closing:
            if self._protocol:
                self._protocol.eof_received()
            self.abort()

    def _reader(self) -> asyncio.BufferedProtocol | None:
        return None if self._reading_paused or self._closing else self._protocol

    def channel_closed(self) -> None:
        """The peer has closed the channel, or it broke."""
        self._peer_ended = True
        self._deliver()

    def close(self) -> None:
        """As `abort`: a channel delivers what it was given before it closes."""
        self.abort()

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._undelivered.clear()
            self._on_end(self)
            self._channel.close()
            self._loop.call_soon(self._lost)

    def _lost(self) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol:
            protocol.connection_lost(None)
