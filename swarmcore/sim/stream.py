"""Streams of a simulated network: what is sent at one end is at the other when link and distance allow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import attrs

from swarmcore.errors import ProtocolError, SwarmError
from swarmcore.rpc.memory_stream import MemoryStream, Parcel, StreamEnd
from swarmcore.sim.hosts import Host
from swarmcore.sim.trace import Trace
from swarmcore.transport import Buffer
from swarmcore.types import PeerId
from swarmcore.wire.framing import decode_header
from swarmcore.wire.limits import Limits

_SIGNAL_BYTES = 64.0
"""What the opening, the end or the abort of a stream takes on the wire."""

_LIMITS = Limits()
_FRAMING = 80
"""Bytes that TCP, TLS and IP put around a small message."""


@attrs.frozen
class Scale:
    """What the bytes of a simulated message stand for on the wire.

    Hidden states of a simulated model are tiny. They count as many bytes as those of the model that they
    stand for; everything else counts as it is.
    """

    hidden: float = 1.0
    """In hidden states."""
    cache: float = 1.0
    """In attention caches that are handed over."""

    def wire_size(self, message: bytearray) -> tuple[float, str]:
        """Bytes that ``message`` takes on the wire, and the method that it opens a stream for, if any."""
        size = float(len(message) + _FRAMING)
        try:
            header = decode_header(memoryview(message), _LIMITS)
        except ProtocolError:
            return size, ""
        for tensor in header.tensors:
            size += tensor.nbytes * ((self.hidden if tensor.name == "hidden" else self.cache) - 1)
        return size, header.method


@attrs.define(eq=False)
class Connection:
    """What carries a stream; afterwards it is kept for the next one, unless it broke."""

    keep: Callable[[], None]
    ends: int = 2
    broken: bool = False


@attrs.frozen
class Wire:
    """What all streams of a network share: how messages are scaled, and the record of those that arrived."""

    scale: Scale
    trace: Trace


class SimStream(MemoryStream):
    """One end of a stream between two simulated hosts."""

    def __init__(
        self,
        end: StreamEnd,
        remote: PeerId,
        host: Host,
        far: Host,
        link: Connection,
        wire: Wire,
        delay: float,
        accept: Callable[[SimStream], None],
    ) -> None:
        super().__init__(end, remote)
        self.host = host
        self.far = far
        self.method = ""
        """What the stream was opened for, once its first message is under way."""
        self.silent_since: float | None = None
        """Since when nothing gets through to the other end, or from there."""
        self._link = link
        self._wire = wire
        self._delay = delay
        self._accept = accept
        self._arriving: deque[Parcel] = deque()
        self._stalled: list[float] = []

    async def send(self, *buffers: Buffer) -> None:
        message = bytearray().join(buffers)
        self._check_size(len(message))
        size, method = self._wire.scale.wire_size(message)
        await self._make_room(size)
        if not self.method:
            self.method = self.other.method = method or "raw"
        self.host.sent[self.method] += round(size)
        self._post(Parcel(size, message))

    def signal_open(self) -> None:
        """Tell the other host that there is a new stream; what is sent meanwhile follows."""
        self._signal(Parcel(0, signal="open"))

    def lose(self, error: SwarmError) -> None:
        """This end learns that the stream is broken; the other end is not told."""
        if self._open:
            self._leave(error, error)

    def mark_broken(self) -> None:
        """The connection under the stream cannot carry another one."""
        self._link.broken = True

    def _leave(self, read_error: SwarmError, write_error: SwarmError) -> None:
        self._link.ends -= 1
        if not self._link.ends and not self._link.broken:
            self._link.keep()
        super()._leave(read_error, write_error)

    def _part(self) -> None:
        if hasattr(self, "other") and not self._arriving and not self.other._arriving:
            other = self.other
            super()._part()
            if not hasattr(self, "other"):
                self.silent_since = other.silent_since = None

    # --- the way there --------------------------------------------------------------------------------

    def _signal(self, parcel: Parcel) -> None:
        self._post(attrs.evolve(parcel, size=_SIGNAL_BYTES))

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
        if not self.host.hears(self.far):
            self._stalled.append(size)
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if (due := self.host.schedule_arrival(size, now)) > now:
            loop.call_at(due, self._arrive)
        else:
            self._arrive()

    def resume(self) -> None:
        """The way is free again: what was held up arrives."""
        stalled, self._stalled = self._stalled, []
        for size in stalled:
            self._reach(size)

    def _arrive(self) -> None:
        parcel = self._arriving.popleft()
        if parcel.signal == "open":
            self._accept(self)
        else:
            if parcel.message is not None:
                self.host.received[self.method] += round(parcel.size)
                if self._open:
                    now = asyncio.get_running_loop().time()
                    self._wire.trace.message(now, self.far.index, self.host.index, parcel.message)
            self._take(parcel)
        self._part()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]} {len(self._arriving)} arriving>"
