"""Random misfortunes of every kind at once, from a seed: `SOAK_SEEDS=0:1000` tries more of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random

import attrs
import pytest
from drafted_text import DraftedText
from memory_swarm import Run, Server, Swarm, quiet, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.errors import BusyError
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.session.move_policy import MoveLimits
from swarmcore.testing.clock import run as run_on_virtual_time
from swarmcore.testing.executor import hidden_states
from swarmcore.testing.faulty import Faults

LAYOUTS = [
    ("0:4", "4:8", "8:12"),
    ("0:6", "6:12"),
    ("0:3", "3:6", "6:9", "9:12"),
    ("0:12",),
    ("0:5", "3:9", "8:12"),
]

FIRST, LAST = map(int, os.environ.get("SOAK_SEEDS", "0:16").split(":"))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_whatever_happens_the_outputs_are_right(seed: int) -> None:
    run_on_virtual_time(soak(seed, ("client", "servers")[seed % 2]))


@pytest.mark.parametrize("seed", range(FIRST, (FIRST + LAST) // 2))
def test_so_they_are_with_drafts_under_way(seed: int) -> None:
    run_on_virtual_time(soak(seed, ("client", "servers")[seed % 2], drafted=True))


async def soak(seed: int, journal: str, drafted: bool = False) -> None:
    chance = random.Random(seed)
    layout = chance.choice(LAYOUTS)
    blocks = (*layout, *layout, *chance.choice(LAYOUTS))
    async with swarm_of(*blocks, seed=seed, delay=0.005 + 0.02 * chance.random()) as swarm:
        swarm.client_transport.faults = Faults(delay=swarm.faults.delay, jitter=0.01)
        chunk_rows = chance.choice([3, 5, 256])
        session = await swarm.open(
            chance.choice([1, 1, 2, 4]), journal=journal, chunk_rows=chunk_rows, patience=300
        )
        trouble = Trouble(swarm, chance)
        running = asyncio.create_task(trouble.run(lambda: session.chain.peers))
        await (drafts if drafted else steps)(session, seed, chance)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await trouble.end()
        await session.close()
        async with asyncio.timeout(100):
            await quiet(swarm)
        await asyncio.sleep(0.1)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("session")]


async def steps(session: InferenceSession, seed: int, chance: random.Random) -> None:
    run = Run.of(session, seed)
    for _ in range(25):
        if chance.random() < 0.05:
            await give_up_a_step(run, chance)
        else:
            await any_step(run, chance)


async def drafts(session: InferenceSession, seed: int, chance: random.Random) -> None:
    text = DraftedText(session, seed, depth=chance.randint(1, 5), longest=chance.choice([2, 4, 8]))
    await text.prompt(*(chance.randint(1, 9) for _ in range(session.sequences)))
    await text.go_on(20)
    await text.end()


@pytest.mark.parametrize("seed", range(FIRST, (FIRST + LAST) // 2))
def test_several_sessions_on_bad_networks_with_little_room(seed: int) -> None:
    run_on_virtual_time(crowd(seed))


async def crowd(seed: int) -> None:
    """Sessions that compete for cache, move to better chains, lose messages, and get copies late."""
    chance = random.Random(seed)
    layout = chance.choice(LAYOUTS)
    blocks = (*layout, *layout, *chance.choice(LAYOUTS))
    router = LeastLatency(chance) if chance.random() < 0.7 else None
    async with swarm_of(*blocks, seed=seed, delay=0.005, router=router, cache=240) as swarm:
        for server in swarm.servers:
            server.transport.faults = Faults(delay=0.005, jitter=0.02, loss=chance.choice([0, 0.002]))
            server.transport.faults_toward[swarm.client.peer] = Faults(
                delay=0.01, jitter=0.01, rate=chance.choice([math.inf, 20_000, 5_000])
            )
        trouble = Trouble(swarm, chance)
        sessions = [
            await swarm.open(
                chance.choice([1, 2]),
                journal=chance.choice(["client", "servers"]),
                moves=MoveLimits(hold=0.0, interval=chance.choice([0.0, 5.0])),
                patience=300,
            )
            for _ in range(3)
        ]
        running = asyncio.create_task(
            trouble.run(lambda: {peer for session in sessions for peer in session.chain.peers})
        )
        await asyncio.gather(*(visit(session, random.Random(seed + i)) for i, session in enumerate(sessions)))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await trouble.end()
        await asyncio.gather(*(session.close() for session in sessions))
        async with asyncio.timeout(100):
            await quiet(swarm)
        await asyncio.sleep(0.1)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("session")]


async def visit(session: InferenceSession, chance: random.Random) -> None:
    """Steps now and then; one for which there is no room is tried again."""
    run = Run.of(session, chance.randrange(1 << 30))
    for _ in range(15):
        for _ in range(100):
            try:
                await run.step(*[1] * session.sequences)
                break
            except BusyError:
                await asyncio.sleep(1)
        else:
            raise AssertionError("no room for a session in 100 s")
        await asyncio.sleep(chance.choice([0, 0, 0.3, 6]))


async def any_step(run: Run, chance: random.Random) -> None:
    count = run.session.sequences
    several = chance.random() < 0.15
    lengths = [chance.randint(0, 7) if several else 1 for _ in range(count)]
    lengths[0] = max(lengths[0], 1)
    sources = [chance.randrange(count) for _ in range(count)] if count > 1 and chance.random() < 0.4 else []
    positions = [run.session.positions[source] for source in sources] or run.session.positions
    starts = [
        max(0, position - chance.randint(0, 3)) if chance.random() < 0.15 else position
        for position in positions
    ]
    await run.step(*lengths, starts=starts, sources=sources, reply=chance.choice(["last", "all"]))


async def give_up_a_step(run: Run, chance: random.Random) -> None:
    session, row = run.session, [0.5] * 4
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2 * chance.random()):
            await session.step(hidden_states([row] * session.sequences), [1] * session.sequences)
            for sequence in run.reference.rows:
                sequence.append(row)
    for sequence, position in zip(run.reference.rows, session.positions, strict=True):
        assert position <= len(sequence)
        del sequence[position:]


class Trouble:
    """Kills, restarts, hangs, cuts off and retires servers at random; there is always another one."""

    def __init__(self, swarm: Swarm, chance: random.Random) -> None:
        self._swarm = swarm
        self._chance = chance
        self._leaving: list[asyncio.Task[None]] = []

    async def run(self, in_use) -> None:
        while True:
            await asyncio.sleep(self._chance.expovariate(1 / 0.15))
            alive = [server for server in self._swarm.servers if not server.dead]
            used = [server for server in alive if server.peer in in_use()]
            server = self._chance.choice((used if self._chance.random() < 0.7 else alive) or alive)
            kinds = [
                self.kill,
                self.kill,
                self.restart,
                self.lose,
                self.hang,
                self.cut,
                self.retire,
                self.forget,
                self.hasten,
            ]
            await self._chance.choice(kinds)(server)

    async def end(self) -> None:
        for server in self._swarm.servers:
            server.transport.heal()
        await asyncio.gather(*self._leaving)

    async def kill(self, server: Server) -> None:
        await server.kill()
        await self._swarm.add(str(server.executor.span))

    async def restart(self, server: Server) -> None:
        await server.kill()
        await self._swarm.add(str(server.executor.span), identity=server.node.identity)

    async def lose(self, server: Server) -> None:
        server.transport.break_connections()

    async def hang(self, server: Server) -> None:
        server.transport.partition()
        self._later(server.transport.heal)

    async def cut(self, server: Server) -> None:
        other = self._chance.choice([s for s in self._swarm.servers if s is not server])
        for one, two in ((server, other), (other, server)):
            one.transport.partition(two.peer)
            self._later(one.transport.heal, two.peer)

    async def retire(self, server: Server) -> None:
        async def leave() -> None:
            await server.service.drain(2)
            if not server.dead:
                await server.kill()

        await server.registry.withdraw()
        await self._swarm.add(str(server.executor.span))
        self._leaving.append(asyncio.create_task(leave()))

    async def forget(self, server: Server) -> None:
        for session in list(server.service._sessions):
            server.engine.close_session(session)

    async def hasten(self, server: Server) -> None:
        """Another one becomes much faster, or slower."""
        rate = self._chance.choice([1.0, 10.0, 100.0])
        info = attrs.evolve(server.info(), decode_rps=rate, forward_rps=100 * rate)
        await server.registry.announce(info, 3600)

    def _later(self, what, *arguments) -> None:
        asyncio.get_running_loop().call_later(self._chance.choice([0.5, 3.0, 8.0]), what, *arguments)
