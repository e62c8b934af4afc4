"""What a server measures of itself, and what it remembers of that."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest

from swarmcore.errors import SwarmError
from swarmcore.executor.base import ScheduledChunk
from swarmcore.identity import Identity
from swarmcore.rpc.node import Node
from swarmcore.server.throughput import (
    MAX_PEERS,
    PAYLOAD,
    PAYLOADS,
    ComputeSpeed,
    ServerSpeed,
    SpeedFile,
    measure_compute,
    measure_network,
)
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import ServerInfo, Span
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import PING_METHOD
from swarmcore.wire.tensors import Tensor

SPEED = ComputeSpeed(decode_rps=120.5, forward_rps=9000.25, decode_threads=1, forward_threads=2)
KEY = {"model": "f" * 32, "device": "a CPU", "version": "1"}


class SlowExecutor(CountingExecutor):
    """Takes 10 ms for a pass and 1 ms for each token of it, through all blocks."""

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        await asyncio.sleep(0.01 + 0.001 * sum(part.tokens for part in batch))
        return await super().step(batch)


@pytest.mark.virtual_time
async def test_computation_is_measured_per_block_and_leaves_nothing():
    executor = SlowExecutor(Span(0, 6))
    speed = await measure_compute(executor)
    assert speed.decode_rps == pytest.approx(6 / 0.011)
    assert speed.forward_rps == pytest.approx(128 * 6 / 0.138)
    assert executor.reserved_tokens == 0
    assert executor.cached(-1) == 0
    assert asyncio.get_running_loop().time() < 2


@pytest.mark.virtual_time
async def test_an_executor_that_takes_no_time_has_no_known_speed():
    assert await measure_compute(CountingExecutor()) == ComputeSpeed(0.0, 0.0)


class ThreadedExecutor(SlowExecutor):
    """Takes 2 ms more for a pass with each further thread, and shares out what its tokens cost."""

    thread_choices = (4, 2, 1)

    def __init__(self, span: Span) -> None:
        super().__init__(span)
        self.threads = (0, 0)

    def use_threads(self, decode: int, forward: int) -> None:
        self.threads = (decode, forward)

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        tokens = sum(part.tokens for part in batch)
        threads = self.threads[0 if tokens == 1 else 1]
        await asyncio.sleep(0.002 * threads + 0.001 * tokens / threads)
        return await CountingExecutor.step(self, batch)


@pytest.mark.virtual_time
async def test_the_best_number_of_threads_is_found_for_single_tokens_and_for_many():
    executor = ThreadedExecutor(Span(0, 6))
    speed = await measure_compute(executor)
    assert executor.threads == (speed.decode_threads, speed.forward_threads) == (1, 4)
    assert speed.decode_rps == pytest.approx(6 / 0.003)
    assert speed.forward_rps == pytest.approx(128 * 6 / 0.040)
    assert "with 1 and 4 threads" in ServerSpeed(speed).describe(6)


class WeightBoundExecutor(ThreadedExecutor):
    """Hardly gains by a second thread, as when all cores wait for the same memory."""

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        await asyncio.sleep({1: 0.0110, 2: 0.0100, 4: 0.0095}[self.threads[1]])
        return await CountingExecutor.step(self, batch)


@pytest.mark.virtual_time
async def test_threads_that_bring_next_to_nothing_are_left_to_others():
    executor = WeightBoundExecutor(Span(0, 6))
    speed = await measure_compute(executor)
    assert executor.threads == (1, 1)
    assert speed.decode_rps == pytest.approx(6 / 0.011)


@asynccontextmanager
async def echoes(count: int, faults: Faults) -> AsyncIterator[tuple[Node, list[ServerInfo], list[int]]]:
    """A node, servers that echo pings over links with ``faults`` both ways, and the sizes of these pings."""
    network = MemoryNetwork()
    sizes: list[int] = []

    async def ping(request: Ping, caller: Caller) -> Pong:
        sizes.append(len(request.payload))
        return Pong(request.payload)

    nodes = []
    for number in range(count + 1):
        identity = Identity.generate()
        transport = FaultyTransport(network.transport(identity), random.Random(number), faults)
        node = Node(identity, [transport])
        node.serve(PING_METHOD, ping)
        await node.start()
        nodes.append(node)
    try:
        yield nodes[0], [ServerInfo(node.peer, tuple(map(str, node.addresses))) for node in nodes], sizes
    finally:
        for node in nodes:
            await node.close()


@pytest.mark.virtual_time
async def test_the_network_is_measured_to_a_few_peers_with_bounded_payloads():
    async with echoes(6, Faults(delay=0.02, rate=1_000_000)) as (node, servers, sizes):
        rate = await measure_network(node, servers, 1000, random.Random(0))
        assert rate == pytest.approx(1000, rel=0.05)
        assert sorted(sizes, reverse=True)[: MAX_PEERS * PAYLOADS] == [PAYLOAD] * MAX_PEERS * PAYLOADS
        assert sum(sizes) == MAX_PEERS * PAYLOADS * PAYLOAD


@pytest.mark.virtual_time
async def test_a_slow_network_is_given_up_in_time():
    async with echoes(3, Faults(rate=1000)) as (node, servers, _):
        before = asyncio.get_running_loop().time()
        assert await measure_network(node, servers, 1000, random.Random(0)) == 0
        assert asyncio.get_running_loop().time() - before <= 16


@pytest.mark.virtual_time
async def test_alone_there_is_no_network_to_measure():
    async with echoes(0, Faults()) as (node, servers, sizes):
        assert await measure_network(node, servers, 1000, random.Random(0)) == 0
        assert sizes == []


def test_throughput_is_the_least_of_what_limits_it():
    assert ServerSpeed(SPEED).throughput(10) == pytest.approx(900.025)
    assert ServerSpeed(SPEED, network_rps=100).throughput(10) == 100
    assert ServerSpeed(SPEED, network_rps=100, stated=7).throughput(10) == 7
    assert ServerSpeed().throughput(10) == 0
    assert "12.1 decode steps/s and 900 tokens/s through 10 blocks" in ServerSpeed(SPEED).describe(10)


def test_a_speed_is_kept_on_disk(tmp_path: Path):
    file = SpeedFile(tmp_path / "new", KEY)
    assert file.read() is None
    file.write(SPEED)
    assert file.read() == SPEED
    assert SpeedFile(file.folder, dict(reversed(KEY.items()))).read() == SPEED
    assert [path.name for path in file.folder.iterdir()] == [file.path.name]


@pytest.mark.parametrize(("age", "fresh"), [(29, True), (31, False), (-1, False)])
def test_a_speed_is_measured_anew_after_a_month_or_when_the_clock_was_set_back(
    tmp_path: Path, age: int, fresh: bool
):
    SpeedFile(tmp_path, KEY, lambda: 1e9).write(SPEED)
    now = 1e9 + age * 24 * 3600
    assert SpeedFile(tmp_path, KEY, lambda: now).read() == (SPEED if fresh else None)


@pytest.mark.parametrize("name", list(KEY))
def test_another_key_is_another_speed(tmp_path: Path, name: str):
    SpeedFile(tmp_path, KEY).write(SPEED)
    assert SpeedFile(tmp_path, {**KEY, name: "other"}).read() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"key": {}, "decode_rps": -1, "forward_rps": 1}'],
)
def test_a_broken_file_is_ignored_with_a_warning_and_rewritten(tmp_path: Path, caplog, content: bytes):
    file = SpeedFile(tmp_path, KEY)
    file.path.write_bytes(content)
    assert file.read() is None
    assert "damaged, measuring anew" in caplog.text
    file.write(SPEED)
    assert file.read() == SPEED


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    file = attrs.evolve(SpeedFile(tmp_path, KEY), folder=tmp_path / "file" / "folder")
    file.write(SPEED)
    assert "could not be kept" in caplog.text
    assert file.read() is None
