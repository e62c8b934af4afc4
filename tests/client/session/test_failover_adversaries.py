"""Servers that lie to a session, and clients' bad habits: nothing hangs, leaks or comes out wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
from memory_swarm import Run, Server, Swarm, quiet, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.errors import SessionLostError
from swarmcore.rpc.channel import Channel
from swarmcore.server.kv_transfer import KvTransfer
from swarmcore.testing.executor import hidden_states
from swarmcore.wire.failure import to_failure
from swarmcore.wire.messages import (
    Draining,
    KvTransferred,
    SessionOpened,
    StepFailed,
    StepForwarded,
    StepOutput,
    TransferKv,
)
from swarmcore.wire.tensors import Tensor

pytestmark = pytest.mark.virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")

Send = Callable[..., Awaitable[None]]
Lie = Callable[[Send, Any, tuple[Tensor, ...]], Awaitable[None]]


class Liar:
    """Stands in for the channel on which a server talks to its client, and sends something else."""

    def __init__(self, channel: Channel, lie: Lie) -> None:
        self._channel = channel
        self._lie = lie

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    async def send(self, record: Any, *tensors: Tensor) -> None:
        await self._lie(self._channel.send, record, tensors)


def corrupt(swarm: Swarm, session: InferenceSession, stage: int, lie: Lie) -> Server:
    """From now on the server of ``stage`` lies to the client of the session."""
    server = swarm.serving(session, stage)
    for hosted in server.service._sessions.values():
        hosted._client._channel = Liar(hosted._client._channel, lie)  # type: ignore[assignment]
    return server


async def wrong_end(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(attrs.evolve(record, blocks_done=record.blocks_done + 1), *tensors)


async def no_tensor(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record)


async def too_many_rows(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record, hidden_states([[0.0] * 4] * 3))


async def too_wide(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record, hidden_states([[0.0] * 5]))


async def flat(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record, Tensor("hidden", "float32", (4,), memoryview(bytes(16))))


async def integers(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record, Tensor("hidden", "int32", (1, 4), memoryview(bytes(16))))


async def garbage(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(record, Tensor("hidden", "float32", (1, 4), memoryview(b"garbage"), "raw+zstd"))


async def out_of_turn(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    await send(SessionOpened(0))


async def forwarded_at_the_end(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    kind = StepOutput if isinstance(record, StepForwarded) else StepForwarded
    await send(kind(record.step, record.blocks_done, attempt=record.attempt), *tensors)


async def failure_with_traps(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    error = SessionLostError("gone")
    error.details.update(message="mine", self="me", origin=3)
    await send(StepFailed(record.step, to_failure(error), record.attempt))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "lie",
    [
        wrong_end,
        no_tensor,
        too_many_rows,
        too_wide,
        flat,
        integers,
        garbage,
        out_of_turn,
        forwarded_at_the_end,
        failure_with_traps,
    ],
)
async def test_a_server_that_breaks_the_rules_is_replaced(stage: int, lie: Lie) -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        liar = corrupt(swarm, session, stage, lie)
        for _ in range(3):
            await run.step(1)
        # A copy that is not sent is missed when it is needed; what looks like an answer is carried on.
        if lie not in (no_tensor, forwarded_at_the_end) or stage == 2:
            assert liar.peer not in session.chain.peers
            assert len(swarm.failovers) == 1
        await swarm.serving(session, 2).kill()
        await run.step(1)
        await session.close()
        await quiet(swarm)


async def never_answers(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    pass


async def floods(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
    """Never answers, but is never silent either."""

    async def flood() -> None:
        for _ in range(10_000):
            await send(Draining(1e300))
            await send(StepForwarded(0, record.blocks_done))
            await send(StepForwarded(10**9, record.blocks_done))
            await send(StepFailed(10**9, to_failure(SessionLostError("gone"))))
            await asyncio.sleep(0.5)

    flooding.append(asyncio.create_task(flood()))


flooding: list[asyncio.Task[None]] = []


@pytest.mark.parametrize("lie", [never_answers, floods])
async def test_a_server_that_lives_and_never_answers_is_replaced_in_time(lie: Lie) -> None:
    async with swarm_of("0:4", "4:8", "8:12", "8:12") as swarm:
        session = await swarm.open(step_timeout=20)
        run = Run.of(session)
        await run.step(5)
        corrupt(swarm, session, 2, lie)
        loop = asyncio.get_running_loop()
        start = loop.time()
        await run.step(1)
        assert loop.time() - start < 25
        assert len(session._moves.tasks) < 3
        await session.close()
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        flooding.clear()
        await quiet(swarm)


async def test_a_server_that_hangs_while_it_is_sent_a_long_prompt_is_found_out() -> None:
    async with swarm_of(*TWICE, delay=0.01) as swarm:
        limits = attrs.evolve(swarm.client_transport.limits, send_buffer=600)
        swarm.client_transport.limits = limits
        session = await swarm.open(chunk_rows=4)
        run = Run.of(session)
        await run.step(3)
        swarm.client_transport.partition(session.chain.peers[0])
        loop = asyncio.get_running_loop()
        start = loop.time()
        await run.step(40)
        assert loop.time() - start < 6
        await session.close()
        swarm.client_transport.heal()
        await quiet(swarm)


async def test_a_server_that_says_it_forwards_and_does_not_is_found_out(monkeypatch) -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal="servers", step_timeout=8)
        run = Run.of(session)
        await run.step(5)
        liar = swarm.serving(session, 0)
        [hosted] = liar.service._sessions.values()

        async def push(*_: object) -> None:
            pass

        monkeypatch.setattr(hosted._downstream, "push", push)
        await run.step(1)
        assert liar.peer not in session.chain.peers
        await run.step(1)
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize("lengths", [(), (9,), (9, 9, 9), (1, 1), (10**12, -1)])
async def test_caches_that_were_not_taken_are_replayed(lengths: tuple[int, ...], monkeypatch) -> None:
    send = Channel.send

    async def lying(self: Channel, record: Any, *tensors: Tensor) -> None:
        await send(self, KvTransferred(lengths) if isinstance(record, KvTransferred) else record, *tensors)

    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(2)
        run = Run.of(session)
        await run.step(5, 3)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        monkeypatch.setattr(Channel, "send", lying)
        assert await leaving.service.drain(30) == 0
        await run.step(1, 1)
        assert [failover.how for failover in swarm.failovers] == ["replayed"]
        await session.close()
        await quiet(swarm)


async def test_a_server_that_never_hands_over_does_not_hold_the_session_up(monkeypatch) -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()

        async def never(self: KvTransfer, order: TransferKv) -> None:
            pass

        monkeypatch.setattr(KvTransfer, "send", never)
        loop = asyncio.get_running_loop()
        start = loop.time()
        leave = asyncio.create_task(leaving.service.drain(1e9))
        await asyncio.sleep(0.1)
        await run.step(1)
        assert loop.time() - start < 70
        assert await leave == 0
        await session.close()
        await quiet(swarm)


async def test_a_server_that_leaves_serves_on_until_somebody_has_room() -> None:
    async with swarm_of("0:4", "4:8", "8:12", "4:8") as swarm:
        session = await swarm.open(patience=10)
        run = Run.of(session)
        await run.step(5)
        leaving = swarm.serving(session, 1)
        other = next(
            s for s in swarm.servers if s is not leaving and s.executor.span == leaving.executor.span
        )
        # Of the same client: it would make room for another one's.
        await other.engine.open("f" * 32, 1, 500, timeout=1, caller=swarm.client.peer)
        await leaving.registry.withdraw()
        drained = asyncio.create_task(leaving.service.drain(100))
        for _ in range(20):
            await run.step(1)
            await asyncio.sleep(1)
        assert session.chain.peers[1] == leaving.peer
        assert swarm.failovers == []
        other.engine.close_session("f" * 32)
        assert await drained == 0
        assert session.chain.peers[1] == other.peer
        await run.step(1)
        await session.close()
        await quiet(swarm)


# --- closing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "kill", "hang", "drain"])
async def test_closing_ends_a_step_under_way_whatever_it_is_doing(what: str) -> None:
    for tick in range(25):
        async with swarm_of(*TWICE, delay=0.01) as swarm:
            session = await swarm.open(2, chunk_rows=3)
            run = Run.of(session)
            await run.step(5, 4)
            server = swarm.serving(session, 1)
            match what:
                case "kill":
                    await server.kill()
                case "hang":
                    server.transport.partition()
                case "drain":
                    leaving = asyncio.create_task(server.service.drain(30))
            step = asyncio.create_task(session.step(hidden_states([[0.5] * 4] * 9), [4, 5]))
            await asyncio.sleep(tick * (0.3 if what == "hang" else 0.008))
            late = step.done()
            loop = asyncio.get_running_loop()
            start = loop.time()
            await session.close()
            assert loop.time() - start < 1
            if not late:
                with pytest.raises(SessionLostError, match="closed on this side"):
                    await step
            with pytest.raises(SessionLostError):
                await session.step(hidden_states([[0.5] * 4]), [1, 0])
            server.transport.heal()
            await quiet(swarm)
            if what == "drain":
                await leaving
            await step if late else None


async def test_opening_that_is_cancelled_leaves_nothing_open() -> None:
    for tick in range(40):
        async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
            opening = asyncio.create_task(swarm.open())
            await asyncio.sleep(tick * 0.003)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            if not opening.cancelled():
                await opening.result().close()
            await quiet(swarm)


async def test_a_callback_that_fails_does_not_hurt_the_session(caplog) -> None:
    async with swarm_of(*TWICE) as swarm:

        def broken(failover: object) -> None:
            raise ZeroDivisionError

        session = await swarm.open(on_failover=broken)
        run = Run.of(session)
        await run.step(2)
        await swarm.serving(session, 1).kill()
        await run.step(1)
        assert "on_failover" in caplog.text
        await session.close()
        await quiet(swarm)


async def test_a_slow_downlink_is_not_taken_for_a_dead_server() -> None:
    """Copies of a long prompt take their time; while they come, the server that sends them is trusted."""
    async with swarm_of("0:6", "6:12", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        first = swarm.serving(session, 0)

        async def slow(send: Send, record: Any, tensors: tuple[Tensor, ...]) -> None:
            if isinstance(record, StepForwarded):
                await asyncio.sleep(3)
            await send(record, *tensors)

        corrupt(swarm, session, 0, slow)
        for _ in range(6):
            await run.step(1)
        await swarm.serving(session, 1).kill()
        await run.step(1)
        assert session.chain.peers[0] == first.peer
        assert len(swarm.failovers) == 1
        await session.close()
        await quiet(swarm)
