"""The other end of the transport benchmark: ``python -m swarmcore.bench.transport_peer CONTENDER PLACE``.

Prints one line of JSON (its address and where its yardstick listens) and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
import struct
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from swarmcore.bench.contender import Contender, yardstick_of
from swarmcore.errors import RemoteFaultError, StreamClosedError
from swarmcore.transport import Stream
from swarmcore.types import Address

ECHO = b"E"
"""First byte of a message that is sent back as it is."""
SINK = b"S"
"""First byte of a message that is thrown away."""
MARK = b"M"
"""A message that is answered with what the process has used so far, a `USAGE`."""
USAGE = struct.Struct("<dQ")
"""CPU seconds, and bytes of memory that are resident now."""

_START_TIMEOUT = 30.0


@contextlib.asynccontextmanager
async def second_process(
    contender: Contender, place: str, start: Callable[..., Awaitable[Process]]
) -> AsyncIterator[tuple[Address, str]]:
    """The other end in a process of its own: its address, and where its yardstick listens, "" for none.

    ``start`` starts this Python with the arguments that it is given, and with pipes for stdin and stdout.
    """
    process = await start("-m", __spec__.name, str(contender), place)
    assert process.stdin and process.stdout
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT)
        if not line:
            raise RemoteFaultError("the benchmark's second process ended at once; its message is above")
        ready = json.loads(line)
        yield Address.parse(ready["address"]), ready["yardstick"] or ""
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _START_TIMEOUT)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def usage(stream: Stream) -> tuple[float, int]:
    """What the other end has used so far, of CPU seconds and memory, once all sent before has arrived."""
    await stream.send(MARK)
    cpu, memory = USAGE.unpack(await stream.receive())
    return cpu, memory


async def echo_seconds(stream: Stream, size: int, count: int, *, at_most: float = math.inf) -> list[float]:
    """How long ``count`` echoes of ``size`` bytes took, each; no more are begun after ``at_most`` seconds."""
    message = ECHO + bytes(size - 1)
    times: list[float] = []
    while len(times) < count and sum(times) < at_most:
        started = time.perf_counter()
        await stream.send(message)
        await stream.receive()
        times.append(time.perf_counter() - started)
    return times


async def answer(stream: Stream) -> None:
    """Serve one stream of the benchmark."""
    with contextlib.suppress(StreamClosedError):
        while True:
            message = await stream.receive()
            if message[:1] == ECHO:
                await stream.send(message)
            elif message[:1] == MARK:
                await stream.send(USAGE.pack(time.process_time(), resident_bytes()))


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


async def serve(name: str, place: str) -> None:
    contender = Contender.parse(name)
    transport = contender.make([place])
    addresses = await transport.listen(answer)
    yardstick = yardstick_of(contender.scheme)
    ready = {"address": str(addresses[0]), "yardstick": yardstick.serve() if yardstick else None}
    json.dump(ready, sys.stdout)
    sys.stdout.write("\n")
    sys.stdout.flush()
    try:
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await transport.close()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
