"""Steps that wait are counted for the client they are for, by what they take once decoded."""

from __future__ import annotations

import asyncio
import secrets

import attrs
import pytest
from memory_swarm import Run, quiet, swarm_of

from swarmcore.errors import DeadlineExceededError, InvalidStepError
from swarmcore.resources import Bounds, Machine, Resource, ResourceLimits, ResourceManager
from swarmcore.server.client_outbox import UNCOUNTED_NBYTES, InFlightBytes
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.types import PeerId
from swarmcore.wire.messages import OpenSession, SessionOpened, Step, StepFailed, StepOutput
from swarmcore.wire.protocols import INFERENCE_PROTOCOL
from swarmcore.wire.tensors import Tensor

ANN, BOB = PeerId("ann"), PeerId("bob")

pytestmark = pytest.mark.virtual_time


def resources(system: int, peer: int) -> ResourceManager:
    limits = ResourceLimits.of(Machine(1024, 2**30))
    return ResourceManager(attrs.evolve(limits, bytes=Bounds(system, peer, system, system)))


def zeros(rows: int, codec: str = "raw") -> Tensor:
    width = COUNTING_MODEL.hidden_size
    return Tensor("hidden", "float32", (rows, width), memoryview(bytes(rows * width * 4))).encode(codec)


async def test_what_is_compressed_counts_as_what_it_will_be() -> None:
    manager = resources(2**22, 2**20)
    in_flight = InFlightBytes(manager, ANN)
    bomb = zeros(2**15, "raw+zstd")
    assert bomb.data.nbytes < 1000
    held = await in_flight.acquire([bomb])
    assert held is not None
    assert manager.used(Resource.BYTES, ANN) == bomb.decoded_nbytes == 2**19
    assert await in_flight.acquire([zeros(1)]) is None
    async with in_flight.reserved([bomb]):
        with pytest.raises(DeadlineExceededError):
            await in_flight.acquire([bomb], 5.0)
        for seconds in (float("nan"), -1.0, 0.0):
            with pytest.raises(DeadlineExceededError):
                await in_flight.acquire([bomb], seconds)
        async with InFlightBytes(manager, BOB).reserved([bomb]):
            pass
    with pytest.raises(InvalidStepError, match="send a long step in several"):
        await in_flight.acquire([bomb, bomb, bomb])
    held.release()
    assert manager.used(Resource.BYTES) == 0


async def test_steps_of_a_client_with_too_much_here_wait_and_are_then_computed() -> None:
    rows = 2 * UNCOUNTED_NBYTES // (4 * COUNTING_MODEL.hidden_size)
    manager = resources(2**30, 3 * UNCOUNTED_NBYTES)
    async with swarm_of() as swarm:
        server = await swarm.add("0:12", resources=manager, cache=2**20)
        channels = []
        for _ in range(4):
            opening = OpenSession(secrets.token_hex(16), COUNTING_MODEL.fingerprint, 0, 12, 1)
            channel = await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, opening)
            assert isinstance((await channel.receive()).record, SessionOpened)
            channels.append(channel)
        for channel in channels:
            await channel.send(Step(0, (0,), (rows,), reply="none"), zeros(rows, "raw+zstd"))
        async with asyncio.timeout(50):
            answers = [(await channel.receive()).record for channel in channels]
        assert all(isinstance(answer, StepOutput) for answer in answers)
        await channels[0].send(Step(1, (rows,), (2 * rows,), reply="none"), zeros(2 * rows, "raw+zstd"))
        refused = (await channels[0].receive()).record
        assert isinstance(refused, StepFailed) and refused.failure.error == "InvalidStepError"
        for channel in channels:
            await channel.close()
        await quiet(swarm)
        assert manager.used(Resource.BYTES) == 0


@pytest.mark.parametrize("turns", range(5))
async def test_a_handler_that_is_cancelled_twice_leaves_no_task(turns: int) -> None:
    """As when a server stops at the moment at which a client vanishes."""
    async with swarm_of("0:6", "6:12") as swarm:
        before = asyncio.all_tasks()
        session = await swarm.open()
        run = Run.of(session)
        await run.step(2)
        await asyncio.sleep(1)
        tasks = {task for task in asyncio.all_tasks() - before if "journal copies" in task.get_name()}
        assert len(tasks) == 1
        [handler] = swarm.serving(session, 0).node._serving
        handler.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        handler.cancel()
        await asyncio.wait([handler])
        await asyncio.sleep(0)
        assert all(task.done() for task in tasks)
        await session.close()
        await quiet(swarm)
