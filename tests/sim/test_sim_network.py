from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarmcore.errors import ConnectionLostError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.sim.hosts import Geography, Host
from swarmcore.sim.network import SimNetwork, SimTransport
from swarmcore.transport import Stream

pytestmark = pytest.mark.virtual_time

DELAY = 0.01


class Pair:
    """Two hosts ten milliseconds apart on links of 1 MB/s, and the streams that one has accepted."""

    def __init__(self) -> None:
        self.network = SimNetwork(Geography(floor=1000 * DELAY, megabits=(8.0,)), random.Random(1))
        self.one, self.other = self.network.add_host(), self.network.add_host()
        self.near = self.network.transport(Identity.from_seed(bytes(32)), self.one, listen=False)
        self.far = self.network.transport(Identity.from_seed(bytes([1] * 32)), self.other)
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def start(self) -> None:
        [self.address] = await self.far.listen(self._accept)

    async def _accept(self, stream: Stream) -> None:
        self.accepted.put_nowait(stream)
        await asyncio.get_running_loop().create_future()

    async def connect(self) -> tuple[Stream, Stream]:
        near = await self.near.open_stream(self.address)
        return near, await self.accepted.get()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Pair, Stream, Stream]]:
    pair = Pair()
    await pair.start()
    near, far = await pair.connect()
    yield pair, near, far
    await pair.near.close()
    await pair.far.close()


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_message_takes_its_distance_and_its_size() -> None:
    async with connected() as (_, near, far):
        began = now()
        await near.send(bytes(100_000))
        await near.send(bytes(10))
        await far.receive()
        assert now() - began == pytest.approx(DELAY + 0.1, rel=0.01)
        await far.receive()
        assert now() - began == pytest.approx(DELAY + 0.1, rel=0.01)


async def test_two_senders_share_the_link_of_the_receiver() -> None:
    async with connected() as (pair, near, far):
        third = pair.network.transport(
            Identity.from_seed(bytes([2] * 32)), pair.network.add_host(), listen=False
        )
        also_near = await third.open_stream(pair.address)
        also_far = await pair.accepted.get()
        began = now()
        await near.send(bytes(100_000))
        await also_near.send(bytes(100_000))
        await asyncio.gather(far.receive(), also_far.receive())
        assert now() - began == pytest.approx(DELAY + 0.2, rel=0.01)
        await third.close()


async def test_a_connection_is_dialled_once_and_used_again() -> None:
    pair = Pair()
    await pair.start()
    began = now()
    near, far = await pair.connect()
    assert now() - began == pytest.approx((2 * pair.network.handshakes + 1) * DELAY, rel=0.01)
    await near.close()
    await far.close()
    await asyncio.sleep(1.0)
    began = now()
    await pair.connect()
    assert now() - began == pytest.approx(DELAY, rel=0.01)
    await pair.near.close()
    await pair.far.close()


async def test_a_killed_process_is_noticed_as_soon_as_the_news_can_travel() -> None:
    async with connected() as (pair, near, _):
        began = now()
        pair.far.kill()
        with pytest.raises(ConnectionLostError):
            await near.receive()
        assert now() - began == pytest.approx(DELAY, rel=0.01)
        with pytest.raises(PeerUnreachableError):
            await pair.near.open_stream(pair.address)


def hang(pair: Pair, host: Host) -> None:
    pair.network.hang(host)


def cut_power(pair: Pair, host: Host) -> None:
    pair.network.cut_power(host)


def split(pair: Pair, host: Host) -> None:
    pair.network.split([host])


@pytest.mark.parametrize("fault", [hang, cut_power, split])
async def test_silence_is_noticed_by_the_keep_alive_and_dials_time_out(fault) -> None:
    async with connected() as (pair, near, _):
        began = now()
        fault(pair, pair.other)
        with pytest.raises(ConnectionLostError):
            await near.receive()
        assert now() - began == pytest.approx(3 * pair.near.limits.keepalive)
        began = now()
        with pytest.raises(PeerUnreachableError):
            await pair.near.open_stream(pair.address)
        assert now() - began == pytest.approx(pair.near.limits.connect_timeout)


async def test_a_cut_that_heals_in_time_only_delays() -> None:
    async with connected() as (pair, near, far):
        pair.network.split([pair.one])
        await near.send(b"late")
        await asyncio.sleep(5.0)
        pair.network.heal()
        assert bytes(await far.receive()) == b"late"
        await asyncio.sleep(10.0)
        await far.send(b"still here")
        assert bytes(await near.receive()) == b"still here"


async def test_a_lost_connection_is_lost_at_both_ends() -> None:
    async with connected() as (pair, near, far):
        assert pair.network.break_any_connection()
        for end in (near, far):
            with pytest.raises(ConnectionLostError):
                await end.receive()


async def test_a_restarted_process_is_not_taken_for_the_old_one() -> None:
    async with connected() as (pair, near, far):
        await near.close()
        await far.close()
        await asyncio.sleep(1.0)
        pair.far.kill()
        pair.far = SimTransport(Identity.from_seed(bytes([1] * 32)), network=pair.network, host=pair.other)
        pair.other.boots += 1
        await pair.start()
        began = now()
        await pair.connect()
        assert now() - began > 5 * DELAY


async def test_what_overtakes_a_large_message_delays_it_by_no_more_than_its_own_size() -> None:
    host = Host(0, 0.0, 0.0, rate=1.0)
    assert host.schedule_arrival(0.1, 5.0) == 5.0
    assert host.schedule_arrival(10.0, 10.0) == pytest.approx(10.1)  # under way since 0
    assert host.schedule_arrival(5.0, 12.0) == pytest.approx(15.1)
    assert host.schedule_arrival(1.0, 30.0) == 30.0  # the link was idle
    assert host.schedule_arrival(1.0, 30.5) == pytest.approx(31.0)
