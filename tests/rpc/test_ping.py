"""Peers are called silent by what is usual for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from swarmcore.errors import DeadlineExceededError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import probe
from swarmcore.rpc.response_times import LEAST, MOST, UNKNOWN, ResponseTime, ResponseTimes
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import PeerId
from swarmcore.wire.messages import InfoRequest, Ping, Pong
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import INFO_METHOD, PING_METHOD


def measured(*seconds: float) -> ResponseTime:
    time = ResponseTime()
    for each in seconds:
        time.measured(each)
    return time


def test_what_is_late_depends_on_what_is_usual() -> None:
    assert ResponseTime().timeout == UNKNOWN
    assert measured(*[0.001] * 20).timeout == LEAST
    assert 0.5 < measured(*[0.5] * 20).timeout < 0.6
    assert measured(*[0.1, 0.6] * 10).timeout > 1.0, "one that varies gets more"
    assert measured(*[60.0] * 20).timeout == MOST


def test_after_silence_more_is_allowed_until_there_is_an_answer() -> None:
    time = measured(*[0.001] * 20)
    time.missed()
    assert time.timeout == 2 * LEAST
    for _ in range(10):
        time.missed()
    assert time.timeout == MOST
    time.measured(0.001)
    assert time.timeout == LEAST


def test_as_many_are_remembered_as_there_is_room_for() -> None:
    times = ResponseTimes(capacity=2)
    for name in ("a", "b", "a", "c"):
        times.of(PeerId(name)).measured(0.1)
    assert times.of(PeerId("a")).known and not times.of(PeerId("b")).known


@asynccontextmanager
async def pair(delay: float) -> AsyncIterator[tuple[Node, Node, FaultyTransport]]:
    network, rng = MemoryNetwork(), Random(1)
    nodes = []
    for seed in (b"a" * 32, b"b" * 32):
        identity = Identity.from_seed(seed)
        transport = FaultyTransport(network.transport(identity), rng, Faults(delay=delay))
        nodes.append(Node(identity, [transport]))

    async def pong(request: Ping, caller: Caller) -> Pong:
        return Pong(request.payload)

    nodes[1].serve(PING_METHOD, pong)
    async with nodes[0], nodes[1]:
        yield nodes[0], nodes[1], transport


@pytest.mark.virtual_time
@pytest.mark.parametrize(("delay", "least", "most"), [(0.005, 1.2, 1.3), (0.2, 2.4, 4.5)])
async def test_silence_is_noticed_sooner_where_answers_come_soon(
    delay: float, least: float, most: float
) -> None:
    async with pair(delay) as (near, far, transport):
        for _ in range(10):
            await probe(near, far.addresses, PING_METHOD, Ping())
        loop = asyncio.get_running_loop()
        transport.partition()
        began = loop.time()
        with pytest.raises(DeadlineExceededError, match="no sign of life"):
            await probe(near, far.addresses, PING_METHOD, Ping())
        assert least - 0.01 <= loop.time() - began <= most
        transport.heal()
        await probe(near, far.addresses, PING_METHOD, Ping())


@pytest.mark.virtual_time
async def test_a_refusal_is_an_answer() -> None:
    async with pair(0.01) as (near, far, _):
        with pytest.raises(ProtocolError):
            await probe(near, far.addresses, INFO_METHOD, InfoRequest())
        assert near.response_times.of(far.peer).known
