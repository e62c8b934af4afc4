"""A peer that calls itself: inside the process, whatever its addresses lead to."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import StreamClosedError, SwarmError, TooManyCallsError
from swarmcore.rpc import Caller, Channel, Method, Node, Protocol
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import PING, Ping, Pong

from .conftest import Nodes

ping = Method(PING, Ping, Pong)
chat = Protocol("/test/chat/1", openings=(Ping,), to_acceptor=(Ping,), to_opener=(Pong,))


async def pong(request: Ping, caller: Caller) -> Pong:
    return Pong(f"{caller.peer} {caller.path}".encode())


def nowhere(node: Node) -> Address:
    return Address(node.addresses[0].scheme, "//192.0.2.1:1", node.peer)


@pytest.mark.parametrize("closed_swarm", [False, True])
async def test_a_call_needs_no_way_out(nodes: Nodes, closed_swarm: bool) -> None:
    node = await nodes.start(allowed_peers=[] if closed_swarm else None)
    node.serve(ping, pong)
    assert (await node.call(nowhere(node), ping, Ping())).payload == f"{node.peer} direct".encode()


async def test_a_channel_and_its_end(nodes: Nodes) -> None:
    node = await nodes.start()
    ended = asyncio.Event()

    async def talk(channel: Channel) -> None:
        try:
            while True:
                await channel.send(Pong((await channel.receive()).record.payload))
        finally:
            ended.set()

    node.serve_protocol(chat, talk)
    async with await node.open(nowhere(node), chat, Ping()) as channel:
        await channel.send(Ping(b"hello"))
        assert (await channel.receive()).record == Pong(b"hello")
    await asyncio.wait_for(ended.wait(), 5)


async def test_limits_hold_for_oneself_as_well(nodes: Nodes) -> None:
    node = await nodes.start(limits=Limits(max_calls_per_peer=1))
    node.serve_protocol(chat, lambda channel: asyncio.sleep(3600))
    node.serve(ping, pong)
    async with await node.open(nowhere(node), chat, Ping()):
        with pytest.raises(TooManyCallsError):
            await node.call(nowhere(node), ping, Ping())


async def test_closing_ends_what_is_under_way(nodes: Nodes) -> None:
    node = await nodes.start()
    node.serve_protocol(chat, lambda channel: asyncio.sleep(3600))
    channel = await node.open(nowhere(node), chat, Ping())
    waiting = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0)
    await node.close()
    with pytest.raises(SwarmError):
        await waiting
    with pytest.raises(StreamClosedError):
        await node.call(nowhere(node), ping, Ping())
