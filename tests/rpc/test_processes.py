"""Peers that are killed, as real processes over real sockets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarmcore.errors import ConnectionLostError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.rpc import Caller, Method, Node
from swarmcore.transport import transport_class
from swarmcore.types import Address
from swarmcore.wire.messages import PING, Ping, Pong

ping = Method(PING, Ping, Pong)

PEER = """
import asyncio, sys
from swarmcore.identity import Identity
from swarmcore.rpc import Method, Node
from swarmcore.transport import transport_class
from swarmcore.types import Address
from swarmcore.wire.messages import PING, Ping, Pong

async def hang(request, caller):
    print("called", flush=True)
    await asyncio.Future()

async def main():
    identity = Identity.generate()
    ping = Method(PING, Ping, Pong)
    async with Node(identity, [transport_class("tcp")(identity, listen_on=["127.0.0.1:0"])]) as node:
        node.serve(ping, hang)
        print(node.addresses[0], flush=True)
        if len(sys.argv) > 1:
            await node.call(Address.parse(sys.argv[1]), ping, Ping(), timeout=60)
        await asyncio.Future()

asyncio.run(main())
"""


@asynccontextmanager
async def peer_process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PEER, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The pipe is only closed at the end of the output.
        assert process.stdout is not None
        await process.stdout.read()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


def node(*, listen: bool) -> Node:
    identity = Identity.generate()
    return Node(identity, [transport_class("tcp")(identity, listen_on=["127.0.0.1:0"] if listen else [])])


async def test_a_server_killed_in_the_middle_of_a_call() -> None:
    async with node(listen=False) as client, peer_process() as server:
        address = Address.parse(await line(server))
        call = asyncio.create_task(client.call(address, ping, Ping(), timeout=60))
        assert await line(server) == "called"
        server.kill()
        with pytest.raises(ConnectionLostError):
            await call
        with pytest.raises(PeerUnreachableError):
            await client.call(address, ping, Ping())


async def test_a_client_killed_in_the_middle_of_its_call() -> None:
    called, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(_request: Ping, _caller: Caller) -> Pong:
        called.set()
        try:
            return await asyncio.Future()
        finally:
            cancelled.set()

    async with node(listen=True) as server:
        server.serve(ping, hang)
        async with peer_process(str(server.addresses[0])) as client:
            await called.wait()
            client.kill()
            await cancelled.wait()
