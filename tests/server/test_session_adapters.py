"""Sessions with an adapter: over several servers, in one batch with others, and when stages change."""

from __future__ import annotations

import asyncio

import pytest
from memory_swarm import Run, quiet, swarm_of
from small_adapters import adapter_tensors, weights_of

from swarmcore.client.adapters import AdapterWeights
from swarmcore.errors import AdapterError, AdapterNotFoundError, SwarmError
from swarmcore.server.adapters import Weights
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.types import Span
from swarmcore.wire.forward_backward import AdapterName, AdapterPart, AdapterWanted
from swarmcore.wire.messages import OpenSession, SessionOpened
from swarmcore.wire.protocols import INFERENCE_PROTOCOL
from swarmcore.wire.tensors import Tensor

pytestmark = pytest.mark.virtual_time

MINE = weights_of(adapter_tensors(seed=1, blocks=(2, 7)), version="a" * 32)
YOURS = weights_of(adapter_tensors(seed=2, blocks=(7,), prefix=5), version="b" * 32)


async def test_sessions_with_different_adapters_share_servers_and_not_results() -> None:
    async with swarm_of("0:5", "5:12") as swarm:
        runs = []
        for number, adapter in enumerate((MINE, None, YOURS, MINE)):
            swarm.planner.adapter = adapter
            runs.append(Run.of(await swarm.open(), number, adapter))
        for length in (7, 1, 1, 3, 1):
            await asyncio.gather(*(run.step(length) for run in runs))
        first, second = swarm.servers
        assert any(len(batch) > 1 for batch in second.executor.batches)
        # Each version came once to each server; the second one has no weights for the first server's blocks.
        assert first.adapters.counters["adapters_asked"] == second.adapters.counters["adapters_asked"] == 2
        assert second.adapters.in_use == 3
        for run in runs:
            await run.session.close()
        await quiet(swarm)
        assert second.adapters.in_use == 0


async def test_a_session_keeps_its_adapter_when_a_server_dies_and_when_one_leaves() -> None:
    async with swarm_of("0:5", "5:12") as swarm:
        swarm.planner.adapter = MINE
        session = await swarm.open()
        run = Run.of(session, adapter=MINE)
        await run.step(6)
        third = await swarm.add("5:12")
        await swarm.serving(session, 1).kill()
        await run.step(1)
        assert session.chain.peers[1] == third.peer and third.adapters.counters["adapters_asked"] == 1
        fourth = await swarm.add("5:12")
        await third.registry.announce(third.info("draining"), 3600)
        leaving = asyncio.create_task(third.service.drain(30))
        while session.chain.peers[1] != fourth.peer:
            await run.step(1)
            await asyncio.sleep(0.1)
        await leaving
        await run.step(2)
        assert fourth.adapters.counters["adapters_asked"] == 1
        assert sum(server.service.counters["sessions_handed_over"] for server in swarm.servers) == 1
        await session.close()
        await quiet(swarm)


async def test_a_session_with_an_adapter_of_the_servers() -> None:
    async with swarm_of("0:12") as swarm:

        async def read(span: Span) -> Weights:
            return Weights([tensor for each in MINE.tensors.values() for tensor in each], MINE.scaling)

        [server] = swarm.servers
        await server.adapters.load_named("poet", read)
        await server.registry.announce(server.info(), 3600)
        swarm.planner.adapter = AdapterWeights(AdapterName(name="poet"))
        run = Run.of(await swarm.open(), adapter=MINE)
        await run.step(5)
        await run.step(1)
        assert not server.adapters.counters
        await run.session.close()


@pytest.mark.parametrize(
    ("adapter", "answer", "error"),
    [
        (AdapterName(name="poet"), None, AdapterNotFoundError),
        (AdapterName(version="short"), None, AdapterError),
        (AdapterName(version="c" * 32), adapter_tensors()[:1], AdapterError),
    ],
)
async def test_a_session_whose_adapter_will_not_do_is_refused(
    adapter: AdapterName, answer: list[Tensor] | None, error: type[SwarmError]
) -> None:
    async with swarm_of("0:12") as swarm:
        [server] = swarm.servers
        opening = OpenSession("0" * 32, COUNTING_MODEL.fingerprint, 0, 12, 1, adapter=adapter)
        async with await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, opening) as channel:
            with pytest.raises(error):
                message = await channel.receive()
                assert answer is not None and isinstance(message.record, AdapterWanted)
                await channel.send(AdapterPart(1.0, last=True), *answer)
                await channel.receive()
        await quiet(swarm)


async def test_weights_that_nobody_asked_for_end_the_session() -> None:
    async with swarm_of("0:12") as swarm:
        [server] = swarm.servers
        opening = OpenSession("0" * 32, COUNTING_MODEL.fingerprint, 0, 12, 1)
        async with await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, opening) as channel:
            assert isinstance((await channel.receive()).record, SessionOpened)
            await channel.send(AdapterPart(1.0, last=True), *adapter_tensors())
            with pytest.raises(SwarmError, match="not asked for"):
                await channel.receive()
        await quiet(swarm)
