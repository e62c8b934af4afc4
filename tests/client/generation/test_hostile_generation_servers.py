"""Generation servers that mean harm: what a client without torch takes of them has a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from head_swarm import COUNTING, CountingText, HeadSwarm, counted, head_swarm, said

from swarmcore.client.generation.remote import MOST_CHARACTERS, MOST_EMPTY_PIECES
from swarmcore.errors import InputError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryRegistry
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.types import ServerInfo
from swarmcore.wire.generate import GenerationEnded, GenerationStarted, TextPiece
from swarmcore.wire.protocols import GENERATE_PROTOCOL

pytestmark = pytest.mark.virtual_time


@asynccontextmanager
async def hostile_head(swarm: HeadSwarm, serve: Callable[[Channel], Awaitable[None]]) -> AsyncIterator[Node]:
    identity = Identity.from_seed(b"h" * 32)
    node = Node(identity, [swarm.network.transport(identity)])
    node.serve_protocol(GENERATE_PROTOCOL, serve)
    await node.start()
    registry = MemoryRegistry(node.peer, swarm.directory)
    await registry.start()
    await registry.announce(ServerInfo(node.peer, tuple(map(str, node.addresses)), heads=(COUNTING,)), 3600)
    try:
        yield node
    finally:
        await registry.close()
        await node.close()


def endless(text: str, tokens: int) -> Callable[[Channel], Awaitable[None]]:
    async def serve(channel: Channel) -> None:
        await channel.send(GenerationStarted(COUNTING.fingerprint, 2))
        while True:
            await channel.send(TextPiece(text, tuple(range(tokens))))
            await asyncio.sleep(0.01)

    return serve


@pytest.mark.parametrize(("tokens", "pieces"), [(1, 17), (5, 4), (60, 1)])
async def test_one_that_never_stops_is_cut_where_the_text_ends(tokens: int, pieces: int) -> None:
    async with head_swarm() as swarm, hostile_head(swarm, endless("spam ", tokens)) as head:
        async with swarm.client.generate("ab", max_new_tokens=16) as generation:
            got = [piece async for piece in generation]
        assert len(got) == pieces
        assert generation.new_tokens == 16
        assert generation.finish_reason == "length"
        assert head.peer in swarm.client.health.banned(asyncio.get_running_loop().time())


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("x", 0), ("x" * 40_000, 0), ("x" * 40_000, 1)])
async def test_one_that_sends_text_for_nothing_is_left_for_another(text: str, tokens: int) -> None:
    async with head_swarm() as swarm, hostile_head(swarm, endless(text, tokens)):
        generation = swarm.client.generate("ab", max_new_tokens=4, patience=1)
        got: list[str] = []
        with pytest.raises(ProtocolError, match="characters of text"):
            async for piece in generation:
                got.append(piece)
        assert len(got) <= MOST_EMPTY_PIECES
        assert sum(map(len, got)) <= 5 * MOST_CHARACTERS
        await swarm.add(CountingText())
        assert await swarm.client.generate("ab", max_new_tokens=4) == said(counted("ab", 4))


async def test_one_that_begins_for_ever_is_no_head() -> None:
    async def serve(channel: Channel) -> None:
        while True:
            await channel.send(GenerationStarted(COUNTING.fingerprint, 2))
            await asyncio.sleep(0.01)

    async with head_swarm() as swarm, hostile_head(swarm, serve):
        with pytest.raises(ProtocolError, match="twice"):
            await swarm.client.generate("ab", patience=1)


async def test_tokens_at_the_end_are_counted_too() -> None:
    async def serve(channel: Channel) -> None:
        await channel.send(GenerationStarted(COUNTING.fingerprint, 2))
        await channel.send(TextPiece("a", (1, 2)))
        await channel.send(GenerationEnded("length", tuple(range(1000))))

    async with head_swarm() as swarm, hostile_head(swarm, serve):
        async with swarm.client.generate("ab", max_new_tokens=4) as generation:
            assert [piece async for piece in generation] == ["a"]
        assert generation.new_tokens == 4


@pytest.mark.parametrize("way", ["", "x", "\x1b[2J/y", "a/" * 50, "x" * 10_000])
async def test_numerics_that_are_none(way: str) -> None:
    async def serve(channel: Channel) -> None:
        await channel.send(GenerationStarted(COUNTING.fingerprint, 2))
        await channel.send(GenerationEnded("length", (1,), numerics=(way,)))

    async with head_swarm() as swarm, hostile_head(swarm, serve):
        with pytest.raises(ProtocolError, match="made in an unknown way"):
            await swarm.client.generate("ab", patience=1)


async def test_an_error_of_a_stranger_is_one_printable_line() -> None:
    async def serve(channel: Channel) -> None:
        raise InputError("\x1b]0;owned\x07\x1b[2J no \n such \u202e prompt")

    async with head_swarm() as swarm, hostile_head(swarm, serve):
        with pytest.raises(InputError) as caught:
            await swarm.client.generate("ab")
    assert str(caught.value) == "^[]0;owned^G^[[2J no such <U+202E> prompt"
