"""A listener in little memory: prints its address, its budget and its memory, then its peak at each line."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.wire.limits import Limits
from swarmcore_transports.tcp import TcpTransport

SPARE = 768 * 2**20


def status(field: str) -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1]) * 1024


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def main() -> None:
    limit = status("VmSize:") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    listener = TcpTransport(Identity.generate(), limits=Limits(), listen_on=["127.0.0.1:0"])
    [address] = await listener.listen(echo)
    print(address, listener.resources.limits.bytes.system, status("VmRSS:"), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(status("VmHWM:"), flush=True)
    await listener.close()


if __name__ == "__main__":
    asyncio.run(main())
