from __future__ import annotations

from swarmcore.types import PeerId
from swarmcore_transports.framed.connection_manager import IdlePool

A, B = PeerId("a"), PeerId("b")


def pool() -> IdlePool[str]:
    return IdlePool(per_peer=2, total=3, keep=60.0)


def test_the_last_used_is_taken_first() -> None:
    idle = pool()
    idle.put(A, "a1", 0.0)
    idle.put(A, "a2", 1.0)
    assert [idle.take(A), idle.take(A), idle.take(A), idle.take(B)] == ["a2", "a1", None, None]


def test_the_oldest_makes_room() -> None:
    idle = pool()
    assert idle.put(A, "a1", 0.0) == []
    assert idle.put(A, "a2", 1.0) == []
    assert idle.put(A, "a3", 2.0) == ["a1"]
    assert idle.put(B, "b1", 3.0) == []
    assert idle.put(B, "b2", 4.0) == ["a2"]
    assert len(idle) == 3


def test_expiry() -> None:
    idle = pool()
    idle.put(A, "a1", 0.0)
    idle.put(B, "b1", 30.0)
    assert idle.expire(59.0) == []
    assert idle.expire(60.0) == ["a1"]
    assert idle.expire(90.0) == ["b1"]
    assert len(idle) == 0


def test_what_is_removed_is_forgotten() -> None:
    idle = pool()
    idle.put(A, "a1", 0.0)
    idle.remove("a1")
    idle.remove("a1")
    assert idle.take(A) is None
    assert idle.expire(1000.0) == []
