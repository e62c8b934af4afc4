"""What remote peers hold is bounded for each and for all, and given out in turn."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest

from swarmcore.errors import BusyError, DeadlineExceededError, ResourceLimitError
from swarmcore.resources import (
    Bounds,
    Machine,
    Priority,
    Reservation,
    Resource,
    ResourceLimits,
    ResourceManager,
)
from swarmcore.resources.limits import CONNECTION_BYTES
from swarmcore.types import PeerId

BYTES, SOCKETS = Resource.BYTES, Resource.DESCRIPTORS
ALICE, BOB, CAROL = (PeerId(name) for name in ("alice", "bob", "carol"))


def manager(*, system: int = 100, peer: int = 40, unproven: int = 20, protocol: int = 80) -> ResourceManager:
    bounds = Bounds(system, peer, unproven, protocol)
    return ResourceManager(ResourceLimits(bounds, bounds, bounds, bounds, bounds))


def refuse(
    resources: ResourceManager, peer: PeerId | None, amount: int, **more: object
) -> ResourceLimitError:
    before = {use.resource: use.used for use in resources.snapshot()}
    with pytest.raises(ResourceLimitError) as caught:
        resources.reserve(peer, BYTES, amount, **more)  # type: ignore[arg-type]
    assert {use.resource: use.used for use in resources.snapshot()} == before
    return caught.value


def test_one_peer_gets_its_share_and_no_more() -> None:
    resources = manager()
    held = resources.reserve(ALICE, BYTES, 40)
    error = refuse(resources, ALICE, 1)
    assert isinstance(error, BusyError)
    assert (error.resource, error.scope, error.limit) == ("bytes", "peer alice", 40)
    resources.reserve(BOB, BYTES, 40)
    held.release()
    held.release()
    assert resources.used(BYTES, ALICE) == 0
    assert resources.used(BYTES) == 40


def test_all_together_and_each_protocol_are_bounded() -> None:
    resources = manager(protocol=50)
    resources.reserve(ALICE, BYTES, 40, protocol="/a/1")
    assert refuse(resources, BOB, 20, protocol="/a/1").scope == "/a/1"
    resources.reserve(BOB, BYTES, 40, protocol="/b/1")
    assert refuse(resources, CAROL, 40).scope == "all peers together"


def test_resources_do_not_mix() -> None:
    resources = manager()
    resources.reserve(ALICE, BYTES, 40)
    resources.reserve(ALICE, SOCKETS, 40)
    assert [use.used for use in resources.snapshot()] == [40, 0, 0, 40, 0]


def test_the_unproven_share_one_bound_until_they_have_proven_an_id() -> None:
    resources = manager()
    waiting = [resources.reserve(None, BYTES, 10) for _ in range(2)]
    assert refuse(resources, None, 1).scope == "peers that have not proven their id"
    waiting[0].prove(ALICE)
    assert resources.used(BYTES, ALICE) == 10
    resources.reserve(None, BYTES, 10)
    waiting[1].release()
    assert [use.unproven for use in resources.snapshot() if use.resource == "bytes"] == [10]


def test_who_proves_an_id_that_holds_too_much_already_stays_unproven() -> None:
    resources = manager()
    resources.reserve(ALICE, BYTES, 35)
    late = resources.reserve(None, BYTES, 10)
    with pytest.raises(ResourceLimitError):
        late.prove(ALICE)
    assert late.peer is None
    late.release()
    assert resources.used(BYTES) == 35


def test_the_oldest_of_the_unproven_makes_room() -> None:
    resources = manager()
    gone: list[int] = []
    for number in range(5):
        resources.reserve(None, BYTES, 10, evict=lambda number=number: gone.append(number))
    assert gone == [0, 1, 2]
    assert resources.used(BYTES) == 20


def test_one_peer_makes_room_only_among_its_own() -> None:
    resources = manager()
    gone: list[str] = []
    resources.reserve(BOB, BYTES, 10, evict=lambda: gone.append("bob"))
    resources.reserve(ALICE, BYTES, 30, evict=lambda: gone.append("alice"))
    resources.reserve(ALICE, BYTES, 20)
    assert gone == ["alice"]


def test_what_is_in_use_is_kept_and_the_longest_unused_goes_first() -> None:
    resources = manager()
    gone: list[str] = []
    first = resources.reserve(ALICE, BYTES, 40, evict=lambda: gone.append("first"))
    second = resources.reserve(BOB, BYTES, 40, evict=lambda: gone.append("second"))
    first.keep()
    resources.reserve(CAROL, BYTES, 20)
    assert gone == []
    first.evictable(lambda: gone.append("first"))  # used after the second
    resources.reserve(CAROL, BYTES, 20)
    assert gone == ["second"]
    second.release()
    assert resources.used(BYTES) == 80


def test_a_flood_of_unproven_peers_takes_nothing_from_the_proven_beyond_its_bound() -> None:
    resources = manager(system=100, peer=10, unproven=20)
    gone: list[str] = []
    for number in range(10):
        resources.reserve(PeerId(f"idle {number}"), BYTES, 10, evict=lambda: gone.append("proven"))
    for _ in range(1000):
        resources.reserve(None, BYTES, 1, evict=lambda: gone.append("unproven"))
    assert gone.count("proven") == 1
    assert resources.used(BYTES) <= 100


def test_a_reservation_grows_within_its_bounds() -> None:
    resources = manager()
    with resources.reserve(ALICE, BYTES, 0) as held:
        resources.reserve(ALICE, BYTES, 10).release()
        held.resize(40)
        with pytest.raises(ResourceLimitError):
            held.resize(41)
        assert resources.used(BYTES, ALICE) == held.amount == 40
        held.resize(15)
        assert resources.used(BYTES, ALICE) == 15
    assert resources.used(BYTES) == 0


def test_a_lower_priority_leaves_room_for_what_matters_more() -> None:
    resources = manager()
    resources.reserve(ALICE, BYTES, 10, priority=Priority.LOW)
    assert refuse(resources, ALICE, 1, priority=Priority.LOW).limit == 10
    resources.reserve(ALICE, BYTES, 20, priority=Priority.MEDIUM)
    resources.reserve(ALICE, BYTES, 10)


def test_those_that_wait_get_their_turn_in_order() -> None:
    resources = manager(peer=100)
    held = resources.reserve(ALICE, BYTES, 90)
    turns: list[str] = []
    got: list[Reservation] = []

    def wait(name: str, peer: PeerId, amount: int) -> None:
        resources.when_free(peer, BYTES, amount, lambda r: (turns.append(name), got.append(r)))

    wait("large", BOB, 60)
    wait("small", CAROL, 5)
    assert turns == []  # the small one would fit, and the large one would never get its turn
    held.resize(40)
    assert turns == ["large"]
    held.release()
    assert turns == ["large", "small"]
    for reservation in got:
        reservation.release()
    assert resources.used(BYTES) == 0


def test_a_peer_at_its_own_bound_holds_up_nobody_else() -> None:
    resources = manager()
    held = resources.reserve(ALICE, BYTES, 40)
    turns: list[str] = []
    for _ in range(3):
        resources.when_free(ALICE, BYTES, 20, lambda r: turns.append("alice"))
    resources.when_free(BOB, BYTES, 40, lambda r: turns.append("bob"))
    assert turns == ["bob"]
    held.release()
    assert turns == ["bob", "alice", "alice"]
    assert [use.waiting for use in resources.snapshot() if use.resource == "bytes"] == [1]


def test_nobody_waits_for_what_can_never_fit() -> None:
    resources = manager()
    with pytest.raises(ResourceLimitError):
        resources.when_free(ALICE, BYTES, 41, lambda r: None)
    with pytest.raises(ResourceLimitError):
        resources.reserve(ALICE, BYTES, 41, evict=lambda: None)


async def test_waiting_ends_at_its_deadline_and_when_it_is_cancelled() -> None:
    resources = manager()
    loop = asyncio.get_running_loop()
    held = resources.reserve(ALICE, BYTES, 40)
    with pytest.raises(DeadlineExceededError, match="no room for 10 bytes"):
        await resources.acquire(ALICE, BYTES, 10, deadline=loop.time())
    waiting = asyncio.create_task(resources.acquire(ALICE, BYTES, 10, deadline=loop.time() + 60))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert [use.waiting for use in resources.snapshot()] == [0, 0, 0, 0, 0]
    later = asyncio.create_task(resources.acquire(ALICE, BYTES, 40, deadline=loop.time() + 60))
    await asyncio.sleep(0)
    held.release()
    with await later:
        assert resources.used(BYTES) == 40
    assert resources.used(BYTES) == 0


async def test_what_was_granted_to_a_waiter_cancelled_at_once_is_given_back() -> None:
    resources = manager()
    held = resources.reserve(ALICE, BYTES, 40)
    waiting = asyncio.create_task(
        resources.acquire(ALICE, BYTES, 10, deadline=asyncio.get_running_loop().time() + 60)
    )
    await asyncio.sleep(0)
    held.release()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert resources.used(BYTES) == 0


def test_nothing_is_kept_of_peers_that_are_gone() -> None:
    resources = manager()
    for number in range(1000):
        peer = PeerId(f"peer {number}")
        resources.reserve(peer, BYTES, 1, protocol=f"/p/{number}").release()
        with pytest.raises(ResourceLimitError):
            resources.reserve(peer, BYTES, 100)
        resources.when_free(peer, BYTES, 5, Reservation.release)
    blocked = resources.reserve(ALICE, BYTES, 40)
    for _ in range(1000):
        resources.when_free(ALICE, BYTES, 5, Reservation.release)()
    blocked.release()
    assert not resources._named


def test_whatever_happens_the_bounds_hold_and_the_sums_agree() -> None:
    rng = random.Random(7)
    for _ in range(30):
        resources = manager()
        held: set[Reservation] = set()
        cancels = []

        def take(reservation: Reservation, held: set[Reservation] = held) -> None:
            held.add(reservation)
            if rng.random() < 0.5:
                reservation.evictable(lambda: held.discard(reservation))

        for _ in range(300):
            peer = rng.choice([ALICE, BOB, CAROL, None])
            some = rng.choice(sorted(held, key=id)) if held else None
            try:
                match rng.randrange(7):
                    case 0 | 1:
                        take(
                            resources.reserve(
                                peer, BYTES, rng.randrange(30), protocol=rng.choice(["", "/a/1"])
                            )
                        )
                    case 2:
                        cancels.append(resources.when_free(peer, BYTES, rng.randrange(20), take))
                    case 3 if some:
                        held.discard(some)
                        some.release()
                    case 4 if some:
                        some.resize(rng.randrange(40))
                    case 5 if some and some.peer is None and peer:
                        some.prove(peer)
                    case 6 if cancels:
                        rng.choice(cancels)()
            except ResourceLimitError:
                pass
            (use,) = (use for use in resources.snapshot() if use.resource == "bytes")
            assert use.used == sum(r.amount for r in held) <= use.limit
            assert use.unproven == sum(r.amount for r in held if r.peer is None) <= 20
            for peer in (ALICE, BOB, CAROL):
                assert resources.used(BYTES, peer) == sum(r.amount for r in held if r.peer == peer) <= 40
        for cancel in cancels:
            cancel()
        for reservation in tuple(held):
            reservation.release()
        assert resources.used(BYTES) == 0
        assert not resources._named


def test_bounds_follow_the_machine() -> None:
    small = ResourceLimits.of(Machine(descriptors=100, memory=2**30))
    assert small.descriptors.system == 75
    assert small.descriptors.unproven <= small.descriptors.system // 2
    # However many files may be open, their buffers have to fit.
    assert ResourceLimits.of(Machine(2**20, 2**32)).descriptors.system * CONNECTION_BYTES <= 2**32 // 8
    for machine in (Machine(0, 0), Machine(34, 2**28), Machine(1000, 2**33), Machine(2**20, 2**40)):
        limits = ResourceLimits.of(machine)
        for bounds in attrs.astuple(limits, recurse=False):
            assert 0 < bounds.peer <= bounds.system
            assert 0 < bounds.unproven <= bounds.system
        # One of the largest messages comes in, however many streams there are and however wide.
        for bound, streams in (
            (limits.bytes.peer, limits.streams.peer),
            (limits.bytes.system, limits.streams.system),
        ):
            windows = bound * Priority.LOW.value + streams * 128 * 1024
            assert bound * Priority.MEDIUM.value - windows >= 64 * 2**20
    assert ResourceManager().limits.descriptors.system > 0
