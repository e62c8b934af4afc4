"""Several steps of one session under way, one behind the other, and what becomes of those called back."""

from __future__ import annotations

import asyncio
import random

import pytest
from drafted_text import DraftedText, rows_of, tokens_of
from memory_swarm import Reference, Run, Server, Swarm, quiet, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.server import inference
from swarmcore.testing.executor import Rows, hidden_states, read_rows
from swarmcore.wire.limits import MAX_STEPS_IN_FLIGHT
from swarmcore.wire.messages import SessionOpened

pytestmark = pytest.mark.virtual_time

THREE = ("0:4", "4:8", "8:12")


def counted(swarm: Swarm, name: str) -> list[int]:
    return [server.service.counters[name] for server in swarm.servers]


def slow(server: Server, seconds: float) -> None:
    server.executor.step_seconds = seconds


async def sent(session: InferenceSession, run: Run, rows: Rows, **options: object):  # type: ignore[no-untyped-def]
    return await session.send(hidden_states(rows), [len(rows)], reply="all", **options)  # type: ignore[arg-type]


async def test_steps_follow_each_other_and_come_back_in_order() -> None:
    async with swarm_of(*THREE, delay=0.01) as swarm:
        session = await swarm.open()
        run, loop = Run.of(session), asyncio.get_running_loop()
        await run.step(3)
        rows, began = run.new_rows(12), loop.time()
        steps = [await sent(session, run, rows[at : at + 3]) for at in range(0, 12, 3)]
        assert session.positions == (15,)
        outputs = [row for step in steps for row in read_rows(await session.receive(step))]
        assert outputs == await run.reference.step([rows], reply="all")
        assert loop.time() - began < 1.5 * 0.04, "they took the time of one"
        await session.close()
        await quiet(swarm)


async def test_no_more_are_under_way_than_servers_take_in() -> None:
    async with swarm_of(*THREE, delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        first = await sent(session, run, run.new_rows(2))
        waiting = asyncio.create_task(sent(session, run, run.new_rows(1)))
        await asyncio.sleep(0.001)
        assert not waiting.done(), "the first step goes alone"
        await session.receive(first)
        await session.receive(await waiting)
        assert session.max_in_flight == MAX_STEPS_IN_FLIGHT
        steps = [await sent(session, run, run.new_rows(1)) for _ in range(MAX_STEPS_IN_FLIGHT)]
        waiting = asyncio.create_task(sent(session, run, run.new_rows(1)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await session.receive(steps[0])
        await waiting
        await session.close()
        await quiet(swarm)


async def test_what_is_called_back_is_dropped_before_it_is_computed() -> None:
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        slow(swarm.serving(session, 1), 0.1)
        steps = [await sent(session, run, run.new_rows(2)) for _ in range(5)]
        await asyncio.sleep(0.03)
        await session.recall(steps[0])
        await session.recall(steps[1])
        slow(swarm.serving(session, 1), 0.0)
        assert session.positions == (3,)
        await run.step(1, starts=[3])
        with pytest.raises(InvalidStepError, match="called back"):
            await session.receive(steps[4])
        assert sum(counted(swarm, "rows_recalled")) >= 8, "at least what waited behind the slow server"
        assert swarm.serving(session, 2).engine.counters["tokens"] == 3 + 1
        await session.close()
        await quiet(swarm)


async def test_what_comes_after_its_recall_is_dropped_as_well() -> None:
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        slow(swarm.serving(session, 0), 0.1)  # what is computed here has yet to come to the others
        steps = [await sent(session, run, run.new_rows(1)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await session.recall(steps[0])
        slow(swarm.serving(session, 0), 0.0)
        await run.step(2)
        assert [server.engine.counters["tokens"] for server in swarm.servers][1:] == [5, 5]
        await session.close()
        await quiet(swarm)


async def test_a_part_of_a_chunk_is_kept_and_the_rest_rolled_back() -> None:
    async with swarm_of(*THREE, delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        drafted = run.new_rows(4)
        head, behind = await sent(session, run, drafted), await sent(session, run, run.new_rows(4))
        outputs = read_rows(await session.receive(head))
        assert outputs == await run.reference.step([drafted], reply="all")
        await session.recall(behind)
        session.rollback([5])
        run.reference.rows[0] = run.reference.rows[0][:5]
        await swarm.serving(session, 1).kill()
        await swarm.add("4:8")
        await run.step(2, reply="all")
        assert session.positions == (7,)
        await session.close()


async def test_servers_tell_how_many_drafts_they_had_and_how_many_were_wrong() -> None:
    async with swarm_of("0:12", delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        await run.step(1)
        assert swarm.servers[0].service.drafts == ""
        await session.receive(await sent(session, run, run.new_rows(5)))
        session.rollback([6])
        await session.receive(await sent(session, run, run.new_rows(2)))
        await session.receive(await sent(session, run, run.new_rows(1)))
        assert swarm.servers[0].service.drafts == (
            "7 rows in 2 steps of several; 3 were taken back, 0 called back before they were computed"
        )
        await session.close()


async def test_a_recall_in_the_middle_of_a_replay_leaves_the_replay_alone() -> None:
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        step = await sent(session, run, run.new_rows(2))
        await swarm.serving(session, 1).kill()
        replacement = await swarm.add("4:8")
        replacement.executor.gate = gate = asyncio.Event()
        while not replacement.engine.counters["steps"] and not replacement.executor.batches:
            await asyncio.sleep(0.001)  # until it is about to compute the replay
        await session.recall(step)
        await asyncio.sleep(0.01)
        gate.set()
        began = asyncio.get_running_loop().time()
        await run.step(1)
        assert asyncio.get_running_loop().time() - began < 0.5
        assert session.failovers == 1
        await session.close()
        await quiet(swarm)


async def test_a_failover_goes_on_without_the_steps_that_it_was_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open(patience=0.5)
        run = Run.of(session)
        await run.step(3)
        await swarm.serving(session, 1).kill()
        step = await sent(session, run, run.new_rows(2))
        await asyncio.sleep(0.1)
        await session.recall(step)
        with pytest.raises(InvalidStepError, match="called back"):
            await session.receive(step)
        await asyncio.sleep(2)  # nobody was there in the meantime
        await swarm.add("4:8")
        await run.step(1)
        await session.close()
        await quiet(swarm)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_cancelled_step_is_called_back() -> None:
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        slow(swarm.serving(session, 1), 1.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await session.step(hidden_states(run.new_rows(2)), [2])
        slow(swarm.serving(session, 1), 0.0)
        await run.step(1)
        assert swarm.serving(session, 2).engine.counters["tokens"] == 3 + 1, "it went no further"
        await session.close()
        await quiet(swarm)


async def test_servers_of_earlier_versions_take_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SessionOpened", lambda *fields: SessionOpened(*fields[:3]))
    async with swarm_of(*THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        assert session.max_in_flight == 1
        step = await sent(session, run, run.new_rows(2))
        waiting = asyncio.create_task(sent(session, run, run.new_rows(2)))
        await asyncio.sleep(0.001)
        assert not waiting.done()
        waiting.cancel()
        await session.recall(step)
        await run.step(1)
        assert not any(counted(swarm, "steps_recalled")), "they were not told"
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_a_server_of_an_earlier_version_takes_over_with_drafts_under_way(
    monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    async with swarm_of(*THREE, delay=0.01) as swarm:
        session = await swarm.open(journal=journal)
        text = DraftedText(session, 5, depth=4)
        await text.prompt(5)
        await text.go_on(4)
        monkeypatch.setattr(inference, "SessionOpened", lambda *fields: SessionOpened(*fields[:3]))
        await swarm.serving(session, 1).kill()
        await swarm.add("4:8")
        await text.go_on(8)
        await text.end()
        assert session.max_in_flight == 1 and len(swarm.failovers) == 1
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize(("said", "taken"), [(3, 3), (10**9, MAX_STEPS_IN_FLIGHT), (-5, 1)])
async def test_no_more_is_under_way_than_a_server_says(
    monkeypatch: pytest.MonkeyPatch, said: int, taken: int
) -> None:
    monkeypatch.setattr(inference, "SessionOpened", lambda *fields: SessionOpened(*fields[:3], said))
    async with swarm_of("0:12", delay=0.001) as swarm:
        session = await swarm.open()
        assert session.max_in_flight == taken
        await session.close()


async def test_a_step_that_reorders_goes_alone() -> None:
    async with swarm_of("0:12", delay=0.001) as swarm:
        session = await swarm.open(2)
        run = Run.of(session)
        await run.step(3, 4)
        await session.send(hidden_states(run.new_rows(2)), [1, 1])
        with pytest.raises(InvalidStepError, match="behind others"):
            await session.send(hidden_states(run.new_rows(2)), [1, 1], sources=[1, 0])
        await session.close()


async def test_what_is_under_way_fails_together() -> None:
    async with swarm_of("0:12", delay=0.001, cache=64) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        steps = [await sent(session, run, run.new_rows(n)) for n in (1, 70, 1)]
        await session.receive(steps[0])
        for step in steps[1:]:
            with pytest.raises(Exception, match="cache"):
                await session.receive(step)
        assert session.positions == (4,)
        await session.close()


async def test_closing_ends_what_is_under_way() -> None:
    async with swarm_of("0:12", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        steps = [await sent(session, run, run.new_rows(1)) for _ in range(MAX_STEPS_IN_FLIGHT)]
        waiting = asyncio.create_task(sent(session, run, run.new_rows(1)))
        await asyncio.sleep(0)
        await session.close()
        for receiving in (session.receive(steps[0]), session.receive(steps[-1]), waiting):
            with pytest.raises(SessionLostError):
                await receiving
        with pytest.raises(SessionLostError):
            await sent(session, run, run.new_rows(1))


async def test_a_leaving_server_has_its_caches_moved_with_drafts_under_way() -> None:
    async with swarm_of(*THREE, *THREE, delay=0.01) as swarm:
        session = await swarm.open(3)
        text = DraftedText(session, 5)
        await text.prompt(4, 2, 6)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        drained = asyncio.create_task(leaving.service.drain(30))
        await text.go_on(12)
        assert await drained == 0
        assert [failover.how for failover in swarm.failovers] == ["handed over"]
        await text.end()
        await session.close()
        await quiet(swarm)


async def test_caches_are_moved_when_what_was_called_back_is_computed() -> None:
    async with swarm_of(*THREE, *THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        leaving = swarm.serving(session, 1)
        slow(leaving, 0.1)
        step = await sent(session, run, run.new_rows(4))
        await asyncio.sleep(0.02)
        await session.recall(step)
        await leaving.registry.withdraw()
        assert await leaving.service.drain(30) == 0
        assert [failover.how for failover in swarm.failovers] == ["handed over"]
        await run.step(1)
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize("seed", range(6))
async def test_later_sessions_begin_with_what_was_kept(seed: int) -> None:
    chance = random.Random(seed)
    prompt = [chance.randrange(4096) for _ in range(chance.randint(50, 64))]
    async with swarm_of(*THREE, delay=0.003) as swarm:
        for server in swarm.servers:
            slow(server, chance.choice([0.0, 0.002]))
        session = await swarm.open(1, [prompt])
        text = DraftedText(session, seed, depth=3, acceptance=0.6)
        await text.prompt(len(prompt), rows=[rows_of(prompt)])
        await text.go_on(10)
        await text.end()
        kept = tokens_of(text.kept[0])
        await session.name_pages([kept])
        await session.close()
        while any(server.service.sessions for server in swarm.servers):
            await asyncio.sleep(0.01)
        again = [*kept, 1, 2, 3]
        async with await swarm.open(1, [again]) as session:
            output = await session.step(hidden_states(rows_of(again)), [len(again)])
            assert session.cached == (len(kept) // 64 * 64,)
            assert read_rows(output) == await Reference().step([rows_of(again)])


async def test_a_server_that_freezes_under_drafts_is_found_as_soon_as_under_single_tokens() -> None:
    async with swarm_of(*THREE, *THREE, delay=0.001) as swarm:
        session = await swarm.open()
        run, loop = Run.of(session), asyncio.get_running_loop()
        stood = []
        for rows in (1, 4):
            for _ in range(10):
                await run.step(rows, reply="all")
            frozen, began = swarm.serving(session, 1), loop.time()
            frozen.transport.partition()
            await run.step(rows, reply="all")
            stood.append(loop.time() - began)
            frozen.transport.heal()
        assert session.failovers == 2
        assert stood[1] < 1.5 * stood[0]
        await session.close()
