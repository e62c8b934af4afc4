"""A peer to kill or to stop: prints its address; echoes what comes in, or never reads when told ``hold``."""

import asyncio
import sys

from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.wire.limits import Limits
from swarmcore_transports.tcp import TcpTransport


async def main(behaviour: str, keepalive: float) -> None:
    async def handle(stream: Stream) -> None:
        while behaviour == "echo":
            await stream.send(await stream.receive())
        await asyncio.Event().wait()

    limits = Limits(keepalive=keepalive, send_buffer=64 * 1024)
    transport = TcpTransport(Identity.generate(), limits=limits, listen_on=["127.0.0.1:0"])
    (address,) = await transport.listen(handle)
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()


asyncio.run(main(sys.argv[1], float(sys.argv[2])))
