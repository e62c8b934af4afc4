"""What sessions keep beside the cache is counted for their peers, and makes room."""

from __future__ import annotations

import attrs

from swarmcore.resources import Bounds, Machine, Resource, ResourceLimits, ResourceManager
from swarmcore.server.kept import Kept
from swarmcore.types import PeerId

ANN, BOB = PeerId("ann"), PeerId("bob")


def resources(system: int, peer: int) -> ResourceManager:
    limits = ResourceLimits.of(Machine(1024, 2**30))
    return ResourceManager(attrs.evolve(limits, bytes=Bounds(system, peer, system, system)))


def keeping(manager: ResourceManager, lost: list[str]):
    return lambda peer, name: Kept(manager, peer, lambda: lost.append(name))


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
