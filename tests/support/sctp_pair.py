"""Two SCTP associations over a link in memory, with a delay, a rate, a queue and losses, on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcsctptransport import RTCSctpCapabilities, RTCSctpTransport

from swarmcore_transports.webrtc.aiortc.sctp_sender import RackSctpTransport

DELAY = 0.025
DATA, SACK = 0, 3


@attrs.define(eq=False, slots=False)
class Wire:
    """Stands for DTLS: carries datagrams to ``other``, one every ``size / rate`` seconds."""

    _role: str
    rate: float = float("inf")
    queue: float = 0.1
    drops: Callable[[bytes], bool] = lambda data: False
    late: Callable[[], float] = lambda: 0.0
    state: str = "connected"
    other: Wire | None = None
    receiver: Any = None
    sent: list[bytes] = attrs.field(factory=list)
    dropped: int = 0
    _free_at: float = 0.0
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set)

    def _register_data_receiver(self, receiver: Any) -> None:
        self.receiver = receiver

    def _unregister_data_receiver(self, receiver: Any) -> None:
        self.receiver = None

    async def _send_data(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.sent.append(data)
        start = max(loop.time(), self._free_at)
        if self.drops(data) or start - loop.time() > self.queue:
            self.dropped += 1
            return
        self._free_at = start + len(data) / self.rate
        loop.call_at(self._free_at + DELAY + self.late(), self._arrive, data)

    def _arrive(self, data: bytes) -> None:
        assert self.other is not None
        if self.other.receiver is not None:
            task = asyncio.get_running_loop().create_task(self.other.receiver._handle_data(data))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        task.result()

    def count(self, chunk_type: int) -> int:
        return sum(1 for data in self.sent if data[12] == chunk_type)


@attrs.define
class End:
    wire: Wire
    transport: RTCSctpTransport
    channel: RTCDataChannel
    received: asyncio.Queue[bytes] = attrs.field(factory=asyncio.Queue)


@asynccontextmanager
async def associated(
    first: type[RTCSctpTransport] = RackSctpTransport, second: type[RTCSctpTransport] = RackSctpTransport
) -> AsyncIterator[tuple[End, End]]:
    wires = Wire("client"), Wire("server")
    wires[0].other, wires[1].other = wires[1], wires[0]
    ends = []
    for wire, made in zip(wires, (first, second), strict=True):
        transport = made(cast(Any, wire))
        channel = RTCDataChannel(transport, RTCDataChannelParameters(label="x", negotiated=True, id=0))
        end = End(wire, transport, channel)
        channel.on("message", end.received.put_nowait)
        ends.append(end)
    for end in ends:
        await end.transport.start(RTCSctpCapabilities(maxMessageSize=262144), 5000)
    async with asyncio.timeout(60):
        while not all(end.channel.readyState == "open" for end in ends):
            await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            await end.transport.stop()


async def deliver(sender: End, receiver: End, size: int, count: int = 1) -> float:
    """Seconds until ``count`` messages have arrived whole."""
    start = asyncio.get_running_loop().time()
    messages = [random.Random(n).randbytes(size) for n in range(count)]
    for message in messages:
        sender.channel.send(message)
    async with asyncio.timeout(120):
        for message in messages:
            assert await receiver.received.get() == message
    return asyncio.get_running_loop().time() - start


def numbered(numbers: set[int], chunk_type: int = DATA) -> Callable[[bytes], bool]:
    """Drops the packets of ``chunk_type`` that are sent as these, counted from 0."""
    seen = -1

    def drops(data: bytes) -> bool:
        nonlocal seen
        seen += data[12] == chunk_type
        return data[12] == chunk_type and seen in numbers

    return drops
