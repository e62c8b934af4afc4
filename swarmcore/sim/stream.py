"""Streams of a simulated network: what is sent at one end is at the other when link and distance allow."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal

import attrs

from swarmcore.errors import (
    MessageTooLargeError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.transport import Buffer, Stream
from swarmcore.types import short

if TYPE_CHECKING:
    from swarmcore.sim.hosts import Host
    from swarmcore.sim.network import SimNetwork
    from swarmcore.sim.transport import SimTransport

_REASON_LENGTH = 200
_SIGNAL_BYTES = 64.0
"""What the opening, the end or the abort of a stream takes on the wire."""

# Only copies of these are raised.
_CLOSED_HERE = StreamClosedError("the stream was closed on this side")
_ENDED_HERE = StreamClosedError("this side has ended the stream")
_CLOSED_THERE = StreamClosedError("the remote closed the stream")

Signal = Literal["open", "end", "close", "drop"]


@attrs.frozen
class Parcel:
    """Something on its way from one end of a stream to the other: a message, or what became of the stream."""

    size: float
    message: bytearray | None = None
    signal: Signal = "end"
    error: SwarmError | None = None


@attrs.define(eq=False)
class Connection:
    """What carries a stream; afterwards it is kept for the next one, unless it broke."""

    dialler: Host
    target: Host
    boot: int
    ends: int = 2
    broken: bool = False


class SimStream(Stream):
    """One end of a stream between two simulated hosts."""

    def __init__(self, transport: SimTransport, far: Host, remote: SimTransport, link: Connection) -> None:
        self.remote = remote.identity.peer
        self.path = "direct"
        self.host = transport.host
        self.far = far
        self.method = ""
        """What the stream was opened for, once its first message is under way."""
        self.silent_since: float | None = None
        """Since when nothing gets through to the other end, or from there."""
        self.other: SimStream
        self._transport = transport
        self._network: SimNetwork = transport.network
        self._link = link
        self._delay = self._network.delay(self.host, far)
        self._bound = transport.limits.send_buffer
        self._unread: deque[Parcel] = deque()
        self._arriving: deque[Parcel] = deque()
        self._stalled: list[float] = []
        self._unacknowledged = 0.0
        self._read_error: SwarmError | None = None
        self._write_error: SwarmError | None = None
        self._ended_here = self._ended_there = False
        self._open = True
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self.host.streams[self] = None

    # --- the stream's own side ------------------------------------------------------------------------

    async def send(self, *buffers: Buffer) -> None:
        message = bytearray().join(buffers)
        limit = self._transport.limits.max_message
        if len(message) > limit:
            raise MessageTooLargeError(
                f"message of {len(message)} bytes is above the limit of {limit}; send it in parts"
            )
        size, method = self._network.scale.weigh(message)
        while True:
            if self._write_error is not None:
                raise _copy(self._write_error)
            if self._ended_here:
                raise StreamClosedError("this side has ended the stream")
            # A message above the bound passes alone: waiting could never make room for it.
            if not self._unacknowledged or self._unacknowledged + size <= self._bound:
                break
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        if not self.method:
            self.method = self.other.method = method or "raw"
        self._unacknowledged += size
        self.host.sent[self.method] += round(size)
        self._post(Parcel(size, message))

    async def receive(self) -> memoryview:
        while not self._unread:
            if self._read_error is not None:
                raise _copy(self._read_error)
            if self._ended_there:
                raise StreamClosedError("the remote ended the stream")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        parcel = self._unread.popleft()
        self.other._acknowledge(parcel.size)
        assert parcel.message is not None
        return memoryview(parcel.message)

    async def end(self) -> None:
        if self._open and not self._ended_here:
            self._ended_here = True
            self._post(Parcel(_SIGNAL_BYTES, signal="end"))

    async def close(self) -> None:
        if not self._open:
            return
        self._ended_here = True
        self._post(Parcel(_SIGNAL_BYTES, signal="close"))
        self._leave(_CLOSED_HERE, _ENDED_HERE)

    def abort(self, reason: str) -> None:
        reason = reason[:_REASON_LENGTH]
        self.drop(StreamClosedError(f"the stream was aborted here: {reason}"), StreamAbortedError(reason))

    def drop(self, seen_here: SwarmError, seen_there: SwarmError) -> None:
        """Break the stream: this end now, the other one when it hears of it."""
        if self._open:
            self._post(Parcel(_SIGNAL_BYTES, signal="drop", error=seen_there))
            self.lose(seen_here)

    def lose(self, error: SwarmError) -> None:
        """This end learns that the stream is broken; the other end is not told."""
        if self._open:
            self._leave(error, error)

    def belongs_to(self, transport: SimTransport) -> bool:
        """Whether this is an end at ``transport``."""
        return self._transport is transport

    def spoil(self) -> None:
        """The connection under the stream cannot carry another one."""
        self._link.broken = True

    def _leave(self, read_error: SwarmError, write_error: SwarmError) -> None:
        self._open = False
        self._read_error = self._read_error or read_error
        self._write_error = self._write_error or write_error
        for parcel in self._unread:
            self.other._acknowledge(parcel.size)
        self._unread.clear()
        _wake(self._reader)
        _wake(self._writer)
        self.host.streams.pop(self, None)
        self._link.ends -= 1
        if not self._link.ends:
            if not self._link.broken:
                self._network.keep(self._link)
            self._part()

    def _part(self) -> None:
        """Forget the other end once neither hears of the other any more: the two would be a cycle."""
        if hasattr(self, "other") and not self._arriving and not self.other._arriving:
            self.silent_since = self.other.silent_since = None
            del self.other.other, self.other

    def _acknowledge(self, size: float) -> None:
        self._unacknowledged = max(self._unacknowledged - size, 0.0)
        _wake(self._writer)

    # --- the way there --------------------------------------------------------------------------------

    def knock(self) -> None:
        """Tell the other host that there is a new stream; what is sent meanwhile follows."""
        self._post(Parcel(_SIGNAL_BYTES, signal="open"))

    def _post(self, parcel: Parcel) -> None:
        """Put a parcel on the wire. Parcels of one stream arrive in order."""
        loop = asyncio.get_running_loop()
        start = max(loop.time(), self.host.up_free)
        self.host.up_free = sent = start + parcel.size / self.host.rate
        if not self.other._open and parcel.message is None:
            return  # nobody is there to take notice
        due = max(sent, start + parcel.size / self.far.rate) + self._delay
        self.other._arriving.append(parcel)
        loop.call_at(due, self.other._reach, parcel.size)

    def _reach(self, size: float) -> None:
        """The last bit of the parcel would be here now, had the link of this host nothing else to carry."""
        if self._network.blocked(self.host, self.far):
            self._stalled.append(size)
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if (due := self.host.take_in(size, now)) > now:
            loop.call_at(due, self._arrive)
        else:
            self._arrive()

    def resume(self) -> None:
        """The way is free again: what was held up arrives."""
        stalled, self._stalled = self._stalled, []
        for size in stalled:
            self._reach(size)

    def _arrive(self) -> None:
        self._take(self._arriving.popleft())
        if not self._link.ends:
            self._part()

    def _take(self, parcel: Parcel) -> None:
        if parcel.message is not None:
            self.host.received[self.method] += round(parcel.size)
            if not self._open:
                self.other._acknowledge(parcel.size)
                return
            self._network.delivered(self.far, self.host, parcel.message)
            self._unread.append(parcel)
            _wake(self._reader)
        elif parcel.signal == "open":
            self._transport.arrived(self)
        elif parcel.signal == "end":
            self._ended_there = True
            _wake(self._reader)
        elif parcel.signal == "close":
            self._ended_there = True
            self._write_error = self._write_error or _CLOSED_THERE
            _wake(self._reader)
            _wake(self._writer)
        elif self._open:
            assert parcel.error is not None
            self._leave(parcel.error, parcel.error)

    def __repr__(self) -> str:
        ends = f"{short(self._transport.identity.peer)} ⇄ {short(self.remote)}"
        return f"<SimStream {ends} {len(self._arriving)} arriving {len(self._unread)} waiting>"


def connect_ends(near: SimStream, far: SimStream) -> None:
    """Make two ends a stream."""
    near.other, far.other = far, near


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _copy(error: SwarmError) -> SwarmError:
    # One exception object raised again and again would gather the traceback of each raise.
    return type(error)(error.message, **error.details)
