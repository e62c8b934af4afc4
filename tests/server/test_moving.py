"""A server that moves to other blocks, and one that leaves, while sessions go on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarmcore.client.swarm import Swarm
from swarmcore.errors import CheckpointError, InputError, ServerDrainingError, SpanError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.throughput import ComputeSpeed, ServerSpeed
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, hidden_states
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import ServerInfo, Span
from swarmcore.wire.messages import OpenSession, SessionOpened
from swarmcore.wire.protocols import INFERENCE_PROTOCOL

pytestmark = pytest.mark.virtual_time

ROW = hidden_states([[0.5] * 4])


class Swarms:
    """Servers and clients of one in-memory network and directory."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.directory = MemoryDirectory()

    @asynccontextmanager
    async def server(
        self, blocks: str, *, seed: int | None = None, **settings: float
    ) -> AsyncIterator[BlockServer]:
        """Rebalances when it has a ``seed``."""
        identity = Identity.generate()
        async with Node(identity, [self.network.transport(identity)]) as node:
            registry = MemoryRegistry(node.peer, self.directory)
            await registry.start()
            server = BlockServer(
                ServerConfig(model="counting", **settings),  # type: ignore[arg-type]
                node,
                registry,
                CountingExecutor(Span.parse(blocks)),
                cache_tokens=400,
                speed=ServerSpeed(ComputeSpeed(100.0, 120.0)),
                seconds_per_block=0.01,
                rng=random.Random(seed) if seed is not None else None,
            )
            async with server:
                yield server
            await registry.close()

    def client(self) -> Swarm:
        identity = Identity.generate()
        node = Node(identity, [self.network.transport(identity, listen=False)])
        return Swarm(node, MemoryRegistry(node.peer, self.directory))


@pytest.fixture
def swarms() -> Swarms:
    return Swarms()


def seen(client: Swarm, server: BlockServer) -> ServerInfo:
    return client.view().servers[server.node.peer]


@asynccontextmanager
async def session(client: Swarm, server: BlockServer, start: int, end: int) -> AsyncIterator[object]:
    """A bare session on some blocks of one server."""
    opening = OpenSession(
        session=f"{random.getrandbits(128):032x}",
        fingerprint=COUNTING_MODEL.fingerprint,
        start=start,
        end=end,
        sequences=1,
        tokens=16,
    )
    async with await client.node.open(server.node.addresses, INFERENCE_PROTOCOL, opening) as channel:
        assert isinstance((await channel.receive()).record, SessionOpened)
        yield channel


async def test_others_see_where_a_server_moves_while_blocks_that_stay_are_served(swarms):
    async with swarms.server("0:6") as server, swarms.server("6:12"), swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.loading = asyncio.Event()
        async with session(client, server, 4, 6):
            moving = asyncio.create_task(server.move_to(Span(4, 10)))
            await asyncio.sleep(1)
            info = seen(client, server)
            assert (info.state, info.span, info.target) == ("online", Span(4, 6), Span(4, 10))
            assert "moving to 4:10" in repr(server)
            async with session(client, server, 4, 5):
                assert server.inference.sessions == 2
            with pytest.raises(SpanError, match="4:6"):
                async with session(client, server, 0, 6):
                    pass
            executor.loading.set()
            await moving
            info = seen(client, server)
            assert (info.state, info.span, info.target) == ("online", Span(4, 10), None)
            assert server.inference.sessions == 1
            async with session(client, server, 4, 10):
                pass


@pytest.mark.parametrize(("target", "stays"), [(Span(6, 10), False), (Span(3, 9), True)])
async def test_what_is_kept_of_sessions_leaves_with_its_blocks(swarms, target: Span, stays: bool) -> None:
    async with (
        swarms.server("0:4"),
        swarms.server("4:6") as server,
        swarms.server("6:12"),
        swarms.client() as client,
    ):
        rows = hidden_states([[0.5] * 4] * 70)
        async with await client.open_session(COUNTING_MODEL, prompts=[[1] * 70]) as asking:
            expected = bytes((await asking.step(rows, [70])).data)
        while not server.engine.prefixes.pages:
            await asyncio.sleep(0.01)
        await server.move_to(target)  # the executor asserts that nobody needs what leaves
        assert (server.engine.prefixes.pages > 0) is stays
        async with (
            swarms.server("4:6"),
            await client.open_session(COUNTING_MODEL, prompts=[[1] * 70]) as asking,
        ):
            assert bytes((await asking.step(rows, [70])).data) == expected


async def test_a_session_on_blocks_that_stay_goes_on_stepping_through_a_move(swarms):
    async with (
        swarms.server("0:4"),
        swarms.server("2:6") as server,
        swarms.server("6:12"),
        swarms.client() as client,
    ):
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        async with await client.open_session(COUNTING_MODEL) as reference:
            expected = [bytes((await reference.step(ROW, [1])).data) for _ in range(9)]
        async with await client.open_session(COUNTING_MODEL) as stepping:
            outputs = [bytes((await stepping.step(ROW, [1])).data) for _ in range(3)]
            executor.loading = asyncio.Event()
            moving = asyncio.create_task(server.move_to(Span(4, 8)))
            await asyncio.sleep(1)
            assert server.info.span == Span(4, 6)
            outputs += [bytes((await stepping.step(ROW, [1])).data) for _ in range(3)]
            assert not moving.done()
            executor.loading.set()
            await moving
            outputs += [bytes((await stepping.step(ROW, [1])).data) for _ in range(3)]
            assert server.inference.sessions == 1
        assert outputs == expected


async def test_sessions_on_blocks_that_leave_get_their_time_and_are_ended_then(swarms):
    async with swarms.server("0:6", drain=20.0) as server, swarms.client() as client:
        loop = asyncio.get_running_loop()
        async with session(client, server, 0, 6):
            before = loop.time()
            await server.move_to(Span(6, 12))
            assert loop.time() - before == pytest.approx(20.0, abs=0.1)
            assert server.inference.sessions == 0
        assert seen(client, server).span == Span(6, 12)
        assert server.engine.cache_tokens_free == 400


async def test_a_server_of_which_nothing_stays_joins_anew(swarms):
    async with swarms.server("0:6") as server, swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.loading = asyncio.Event()
        moving = asyncio.create_task(server.move_to(Span(6, 12)))
        await asyncio.sleep(1)
        info = seen(client, server)
        assert (info.state, info.span, info.target) == ("joining", Span(6, 12), None)
        with pytest.raises(ServerDrainingError):
            async with session(client, server, 6, 12):
                pass
        with pytest.raises(InputError, match="is moving already"):
            await server.move_to(Span(0, 6))
        executor.loading.set()
        await moving
        async with session(client, server, 6, 12):
            pass


async def test_a_move_to_where_it_is_loads_nothing(swarms):
    async with swarms.server("0:6") as server, swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.load_failures.append(CheckpointError("must not be called"))
        await server.announce_target(Span(0, 6))
        await server.move_to(Span(0, 6))
        assert seen(client, server).target is None
        assert executor.load_failures


@pytest.mark.parametrize("target", ["4:10", "6:12"])
async def test_a_server_that_cannot_load_goes_back_to_what_it_had(swarms, target):
    async with swarms.server("0:6") as server, swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.load_failures.append(CheckpointError("the file is damaged"))
        with pytest.raises(CheckpointError):
            await server.move_to(Span.parse(target))
        info = seen(client, server)
        assert (info.state, info.span, info.target) == ("online", Span(0, 6), None)
        async with session(client, server, 0, 6):
            pass


async def test_a_server_that_cannot_go_back_stays_on_what_is_left(swarms):
    async with swarms.server("0:6") as server, swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.load_failures.extend(CheckpointError("the disk is gone") for _ in range(2))
        with pytest.raises(CheckpointError):
            await server.move_to(Span(4, 10))
        assert seen(client, server).span == Span(4, 6)
        async with session(client, server, 4, 6):
            pass


async def test_a_server_that_cannot_load_anything_leaves(swarms):
    async with swarms.server("0:6") as server, swarms.client() as client:
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.load_failures.extend(CheckpointError("the disk is gone") for _ in range(2))
        with pytest.raises(CheckpointError):
            await server.move_to(Span(6, 12))
        assert seen(client, server).state == "draining"


async def test_a_crowd_spreads_by_itself_and_then_stays(swarms):
    async with (
        swarms.client() as client,
        swarms.server("0:4", seed=1) as a,
        swarms.server("0:4", seed=2) as b,
        swarms.server("0:4", seed=3) as c,
        swarms.server("4:8") as fixed,
    ):
        await asyncio.sleep(600)
        servers = (a, b, c, fixed)
        spans = [seen(client, server).span for server in servers]
        held = {block for span in spans if span for block in span}
        assert held == set(range(12))
        assert all(note.startswith("placement: staying: ") for s in (a, b, c) for note in s.notes)
        assert (await client.info(a.node.peer)).notes == a.notes
        assert fixed.notes == ("placement: it stays on its blocks, as it was told",)
        await asyncio.sleep(3600)
        assert [seen(client, server).span for server in servers] == spans


async def test_a_gap_is_closed_within_seconds_however_rare_the_looks(swarms):
    async with (
        swarms.server("0:6", seed=1, rebalance=3600.0) as a,
        swarms.server("0:6", seed=2, rebalance=3600.0) as b,
    ):
        async with swarms.server("6:12"):
            await asyncio.sleep(1000)
            assert (a.moves, b.moves) == (0, 0)
        await asyncio.sleep(30)
        assert sorted(server.span for server in (a, b)) == [Span(0, 6), Span(6, 12)]
        assert a.moves + b.moves == 1


async def test_a_server_that_was_told_where_to_stay_says_so_and_stays(swarms):
    async with (
        swarms.client() as client,
        swarms.server("0:6") as told,
        swarms.server("0:6", seed=1, rebalance=0.0) as stays,
        swarms.server("0:6", seed=2) as free,
    ):
        assert [seen(client, server).pinned for server in (told, stays, free)] == [True, True, False]
        await asyncio.sleep(300)
        assert [server.span.start for server in (told, stays, free)] == [0, 0, 6]


async def test_a_leaving_server_waits_for_its_sessions_and_takes_no_new_ones(swarms):
    async with swarms.server("0:12", drain=20.0) as server, swarms.client() as client:
        loop = asyncio.get_running_loop()
        before = loop.time()
        async with session(client, server, 0, 12):
            leaving = asyncio.create_task(server.leave())
            await asyncio.sleep(5)
            assert seen(client, server).state == "draining"
            assert server.notes == ("leaving: it takes no new sessions",)
            with pytest.raises(ServerDrainingError):
                async with session(client, server, 0, 12):
                    pass
        assert await leaving == 0
        assert loop.time() - before == pytest.approx(5, abs=0.1)


async def test_a_server_without_sessions_leaves_at_once(swarms):
    async with swarms.server("0:12") as server:
        before = asyncio.get_running_loop().time()
        assert await server.leave() == 0
        assert asyncio.get_running_loop().time() == before


async def test_speed_is_announced_from_the_first_moment(swarms):
    async with swarms.server("0:6") as server, swarms.client() as client:
        info = seen(client, server)
        assert info.throughput == 20.0
        assert (info.decode_rps, info.forward_rps) == (pytest.approx(100 / 6), 20.0)


async def test_round_trips_to_servers_that_may_follow_are_announced(swarms):
    async with (
        swarms.server("0:6", seed=1) as first,
        swarms.server("6:12") as second,
        swarms.client() as client,
    ):
        await asyncio.sleep(120)
        assert [rtt.peer for rtt in seen(client, first).rtts] == [second.node.peer]


async def test_a_move_that_fails_is_tried_again_and_told(swarms):
    async with swarms.server("0:6", seed=1, rebalance=60.0) as server, swarms.server("0:6"):
        executor = server.executor
        assert isinstance(executor, CountingExecutor)
        executor.load_failures.append(CheckpointError("the file is damaged"))
        while executor.load_failures:
            await asyncio.sleep(1)
        await asyncio.sleep(1)
        assert server.notes == ("placement: could not move to 6:12: the file is damaged",)
        await asyncio.sleep(200)
        assert server.span == Span(6, 12)
