"""A data channel of libwebrtc, by the package wrtc."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import webrtc

from swarmcore.errors import ConnectionLostError
from swarmcore_transports.webrtc.engine import DataChannel

logger = logging.getLogger(__name__)

_MOST_INSIDE = 4 * 2**20
"""Bytes that are left to libwebrtc, which closes a channel on which 16 MiB wait; more than any link holds."""

_LOW_INSIDE = 2 * 2**20


class WrtcChannel(DataChannel):
    """What libwebrtc should not hold yet waits here, and so does what is sent before the channel is open."""

    def __init__(self, channel: webrtc.RTCDataChannel) -> None:
        super().__init__()
        self._channel = channel
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._low_water = 0
        self._is_open = channel.ready_state == "open"
        self._closing = False
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_open:
            self._opened.set_result(None)
        channel.on("open", lambda event: self._open())
        channel.on("message", self._received)
        channel.on("bufferedamountlow", lambda event: self._pass_on())
        channel.on("close", lambda event: self.ended())

    async def opened(self) -> None:
        """Wait until it is open. Raise `ConnectionLostError` when it was closed instead."""
        await asyncio.shield(self._opened)

    def _open(self) -> None:
        self._is_open = True
        if not self._opened.done():
            self._opened.set_result(None)
        self._pass_on()

    def _received(self, event: webrtc.MessageEvent) -> None:
        data = event.data
        if isinstance(data, bytes):
            self._message(data)
        else:  # nothing that our streams send
            logger.debug("a channel was closed on which text came")
            self._break()

    @property
    def queued(self) -> int:
        return self._waiting_bytes + int(self._channel.buffered_amount)

    def set_low(self, amount: int) -> None:
        self._low_water = amount
        if not self._waiting:
            self._channel.buffered_amount_low_threshold = amount

    def send(self, data: bytes) -> None:
        if self._closing or self._closed:
            return
        if self._waiting or not self._is_open or self._channel.buffered_amount > _MOST_INSIDE:
            if not self._waiting:
                self._channel.buffered_amount_low_threshold = _LOW_INSIDE
            self._waiting.append(data)
            self._waiting_bytes += len(data)
        else:
            self._give(data)

    def _give(self, data: bytes) -> None:
        try:
            self._channel.send(data)
        except webrtc.InvalidStateError:
            pass  # it closes; what is said about that comes by event
        except (webrtc.OperationError, TypeError) as exc:
            # Queue full, or longer than what the peer says it takes: an ordered channel cannot leave it out.
            logger.debug("a channel was closed that did not take %d bytes: %r", len(data), exc)
            self._break()

    def _pass_on(self) -> None:
        """libwebrtc has room."""
        while self._waiting and self._channel.buffered_amount <= _MOST_INSIDE and not self._closed:
            data = self._waiting.popleft()
            self._waiting_bytes -= len(data)
            self._give(data)
        if self._waiting or self._closed:
            return
        self._channel.buffered_amount_low_threshold = self._low_water
        if self._closing:
            self._channel.close()
        elif self._channel.buffered_amount <= self._low_water:
            self._low()

    def _break(self) -> None:
        self._drop()
        self.close()
        self.ended()

    def _drop(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def ended(self) -> None:
        """The channel is closed, by whomever. Harmless when repeated."""
        if self._closed:
            return
        self._drop()
        if not self._opened.done():
            self._opened.set_exception(ConnectionLostError("the connection was closed"))
            self._opened.exception()  # seen here: nobody may wait
        self._ended()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._waiting:
                self._channel.close()
