"""The other end of the transport benchmark: ``python -m swarmcore.bench.transport_peer SCHEME PLACE``.

Prints one line of JSON (its address and the port of the bare TLS socket) and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import time

from swarmcore.bench.bare_tls import serve_bare_tls
from swarmcore.errors import StreamClosedError
from swarmcore.identity import Identity
from swarmcore.transport import Stream, transport_class

ECHO = b"E"
"""First byte of a message that is sent back as it is."""
SINK = b"S"
"""First byte of a message that is thrown away."""
MARK = b"M"
"""A message that is answered with the process's CPU seconds so far, as a float64."""


async def answer(stream: Stream) -> None:
    """Serve one stream of the benchmark."""
    with contextlib.suppress(StreamClosedError):
        while True:
            message = await stream.receive()
            if message[:1] == ECHO:
                await stream.send(message)
            elif message[:1] == MARK:
                await stream.send(struct.pack("<d", time.process_time()))


async def serve(scheme: str, place: str) -> None:
    transport = transport_class(scheme)(Identity.generate(), listen_on=[place])
    addresses = await transport.listen(answer)
    json.dump({"address": str(addresses[0]), "bare_tls_port": serve_bare_tls()}, sys.stdout)
    sys.stdout.write("\n")
    sys.stdout.flush()
    try:
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await transport.close()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
