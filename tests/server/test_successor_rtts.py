"""A server knows how far its successors are, and announces no more of it than is news."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from measured_peers import MODEL, MeasuredPeers, measured_peers

from swarmcore.server.successor_rtts import SuccessorRttLimits, SuccessorRtts
from swarmcore.types import Span

pytestmark = pytest.mark.virtual_time


@asynccontextmanager
async def rtts_of(peers: MeasuredPeers, **limits: Any) -> AsyncIterator[SuccessorRtts]:
    found = SuccessorRtts(
        peers.node,
        peers.view,
        MODEL,
        lambda: Span(0, 6),
        rng=Random(0),
        limits=SuccessorRttLimits(**limits),
    )
    found.start()
    try:
        yield found
    finally:
        await found.close()


async def test_round_trips_to_holders_of_the_next_block_are_published_nearest_first() -> None:
    async with measured_peers() as peers:
        far, near = await peers.add(6, 12, 0.08), await peers.add(4, 8, 0.02)
        await peers.add(0, 6, 0.01)
        await peers.add(7, 12, 0.01)
        await peers.add(6, 12, 0.01, state="joining")
        peers.announce(peers.node, 0, 7)
        peers.add_unreachable(6, 12)
        async with rtts_of(peers) as found:
            await asyncio.sleep(30)
            assert [(rtt.peer, pytest.approx(rtt.seconds, abs=1e-4)) for rtt in found.rtts] == [
                (near, 0.02),
                (far, 0.08),
            ]


async def test_of_many_successors_the_nearest_are_found_in_some_rounds() -> None:
    async with measured_peers() as peers:
        added = [await peers.add(6, 12, 0.01 * (n + 1)) for n in range(12)]
        async with rtts_of(peers, published=3, pinged=5) as found:
            await asyncio.sleep(600)
            assert [rtt.peer for rtt in found.rtts] == added[:3]


async def test_what_is_announced_stays_the_same_while_nothing_changes() -> None:
    async with measured_peers() as peers:
        leaves, stays = await peers.add(6, 12, 0.02), await peers.add(6, 12, 0.04)
        async with rtts_of(peers) as found:
            await asyncio.sleep(30)
            announced = found.rtts
            await asyncio.sleep(600)
            assert found.rtts is announced
            del peers.servers[leaves]
            await asyncio.sleep(90)
            assert [rtt.peer for rtt in found.rtts] == [stays]
