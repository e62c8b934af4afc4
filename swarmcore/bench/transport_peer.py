"""The other end of the transport benchmark: ``python -m swarmcore.bench.transport_peer SCHEME PLACE``.

Prints one line of JSON (its address and where its yardstick listens) and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import struct
import sys
import time
from pathlib import Path

from swarmcore.bench.yardstick import yardstick_of
from swarmcore.errors import StreamClosedError
from swarmcore.identity import Identity
from swarmcore.transport import Stream, transport_class

ECHO = b"E"
"""First byte of a message that is sent back as it is."""
SINK = b"S"
"""First byte of a message that is thrown away."""
MARK = b"M"
"""A message that is answered with what the process has used so far, a `USAGE`."""
USAGE = struct.Struct("<dQ")
"""CPU seconds, and bytes of memory that are resident now."""


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


async def serve(scheme: str, place: str) -> None:
    transport = transport_class(scheme)(Identity.generate(), listen_on=[place])
    addresses = await transport.listen(answer)
    yardstick = yardstick_of(scheme)
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
