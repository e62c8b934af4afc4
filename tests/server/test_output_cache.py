"""What sessions keep beside the cache is counted for their peers, and makes room."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.resources import Bounds, Machine, Resource, ResourceLimits, ResourceManager
from swarmcore.server.output_cache import EvictableBytes, ReplayCache
from swarmcore.testing.executor import CountingExecutor, hidden_states
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import Replay, Step
from swarmcore.wire.tensors import Tensor

ANN, BOB = PeerId("ann"), PeerId("bob")


def resources(system: int, peer: int) -> ResourceManager:
    limits = ResourceLimits.of(Machine(1024, 2**30))
    return ResourceManager(attrs.evolve(limits, bytes=Bounds(system, peer, system, system)))


def keeping(manager: ResourceManager, lost: list[str]):
    return lambda peer, name: EvictableBytes(manager, peer, lambda: lost.append(name))


def test_the_oldest_of_a_peer_makes_room_for_its_others():
    lost: list[str] = []
    manager = resources(1000, 100)
    keep = keeping(manager, lost)
    first, second = keep(ANN, "first"), keep(ANN, "second")
    first.resize(40)
    second.resize(30)
    assert lost == []
    second.resize(60)
    assert lost == ["first"]
    assert (first.nbytes, second.nbytes) == (0, 60)
    first.resize(15)
    assert manager.used(Resource.BYTES) == 75, "three quarters, the rest is for what cannot be dropped"
    first.close()
    second.close()
    assert manager.used(Resource.BYTES) == 0


def test_what_is_larger_than_the_bound_is_dropped_alone():
    lost: list[str] = []
    manager = resources(1000, 100)
    keep = keeping(manager, lost)
    other, large = keep(BOB, "other"), keep(ANN, "large")
    other.resize(50)
    large.resize(10)
    large.resize(200)
    assert lost == ["large"]
    assert large.nbytes == 0
    assert manager.used(Resource.BYTES) == other.nbytes == 50
    large.resize(5)
    assert manager.used(Resource.BYTES, ANN) == 5


def test_it_makes_room_for_what_arrives():
    lost: list[str] = []
    manager = resources(100, 100)
    kept = keeping(manager, lost)(ANN, "it")
    kept.resize(60)
    manager.reserve(BOB, Resource.BYTES, 90)
    assert lost == ["it"]
    assert kept.nbytes == 0
    kept.close()
    assert manager.used(Resource.BYTES) == 90


ROW = [0.5] * 4


class Decoding(CountingExecutor):
    """Knows what was decoded, and how much of it at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded: list[Tensor] = []

    async def decode(self, tensor: Tensor) -> Tensor:
        self.decoded.append(tensor)
        return tensor.decode()


async def test_a_replay_decodes_what_it_needs_and_no_more_than_can_be_sent() -> None:
    executor, counters = Decoding(), Counter[str]()
    kept = ReplayCache(
        2,
        executor=executor,
        resources=resources(2**20, 2**20),
        client=ANN,
        counters=counters,
        limits=Limits(max_message=4096, max_decoded=2048),
    )
    for number in range(20):
        step = Step(number, (8 * number, 0), (8, 0), journal="servers", settled=number)
        kept.add(step, hidden_states([[float(number), *ROW[1:]]] * 8).encode("raw+zstd"))
    rows = await kept.rows(Replay(20, (4, 0), (8, 0), (), codec="raw+zstd", settled=20))
    assert rows.decode().shape == (8, 4)
    assert len(executor.decoded) == 2
    for lengths, message in (
        ((0, 0), "of 0 tokens"),
        ((-5, 0), "of -5 tokens"),
        ((10**15, 0), "ask for fewer"),
        ((160, 0), "too many outputs"),
        ((300, -50), "negative|ask for fewer|rows|too many"),
        ((8, 8), "not kept"),
    ):
        executor.decoded.clear()
        with pytest.raises(InvalidStepError, match=message):
            await kept.rows(Replay(20, (0, 0), lengths, (), settled=20))
        assert sum(tensor.decoded_nbytes for tensor in executor.decoded) <= 2048
    kept._drop()
    assert counters["outputs_dropped"] == 1
    with pytest.raises(SessionLostError, match="make room"):
        await kept.rows(Replay(20, (0, 0), (8, 0), (), settled=20))
    kept.close()
