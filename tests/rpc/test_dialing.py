"""Which of a peer's addresses is tried when, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from swarmcore.errors import (
    AddressError,
    DeadlineExceededError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.rpc.dialing import STAGGER, dial
from swarmcore.rpc.memory_stream import MemoryStream, StreamEnd
from swarmcore.testing import MemoryNetwork
from swarmcore.testing.memory import MemoryTransport
from swarmcore.transport import Stream
from swarmcore.types import Address

pytestmark = pytest.mark.virtual_time

ME, PEER = Identity.from_seed(b"m" * 32), Identity.from_seed(b"p" * 32)


def at(place: str, scheme: str = "memory") -> Address:
    return Address(scheme, f"//{place}", PEER.peer)


class Slow(MemoryTransport):
    """Opens a stream after the seconds that a place takes, or raises the error that is there instead."""

    def __init__(self, network: MemoryNetwork, outcomes: Mapping[str, Any], scheme: str = "memory") -> None:
        super().__init__(ME, network=network)
        self.scheme = scheme  # type: ignore[misc]
        self.outcomes = outcomes
        self.started: list[tuple[str, float]] = []
        self.opened: list[Stream] = []

    def preference(self, address: Address) -> int:
        return address.location.count("!")

    async def open_stream(self, address: Address) -> Stream:
        place = address.location.removeprefix("//")
        self.started.append((place, asyncio.get_running_loop().time()))
        delay, error = self.outcomes[place], None
        if isinstance(delay, tuple):
            delay, error = delay
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            if error != "stubborn":
                raise
        if isinstance(error, SwarmError):
            raise error
        stream = MemoryStream(StreamEnd(ME.peer, self.limits, {}), address.peer)
        stream.connect(MemoryStream(StreamEnd(address.peer, self.limits, {}), ME.peer))
        stream.path = place
        self.opened.append(stream)
        return stream


def slow(outcomes: Mapping[str, Any], scheme: str = "memory") -> dict[str, Slow]:
    return {scheme: Slow(MemoryNetwork(), outcomes, scheme)}


async def opened(transports: Mapping[str, Slow], *addresses: Address, within: float = 10.0) -> str:
    deadline = asyncio.get_running_loop().time() + within
    return (await dial(transports, addresses, deadline)).path


async def test_the_first_to_answer_wins_and_each_has_a_head_start() -> None:
    transports = slow({"silent": 30.0, "slow": 2.0, "quick": 0.1})
    assert await opened(transports, at("silent"), at("slow"), at("quick")) == "quick"
    assert transports["memory"].started == [("silent", 0.0), ("slow", STAGGER), ("quick", 2 * STAGGER)]
    assert asyncio.get_running_loop().time() == pytest.approx(2 * STAGGER + 0.1)
    assert len(asyncio.all_tasks()) == 1


async def test_the_next_starts_as_soon_as_the_one_before_has_failed() -> None:
    transports = slow({"refused": (0.05, PeerUnreachableError("refused")), "good": 0.1})
    assert await opened(transports, at("refused"), at("good")) == "good"
    assert asyncio.get_running_loop().time() == pytest.approx(0.15)


async def test_an_address_that_answers_in_time_is_the_only_one_that_is_tried() -> None:
    transports = slow({"near": STAGGER - 0.01, "far": 0.0})
    assert await opened(transports, at("near"), at("far")) == "near"
    assert [place for place, _ in transports["memory"].started] == ["near"]


async def test_transports_come_in_their_order_and_addresses_in_that_of_preference() -> None:
    transports = {**slow({"a": 9.0, "b!": 9.0, "c!!": 9.0}), **slow({"d": 9.0}, "other")}
    await opened(transports, at("d", "other"), at("c!!"), at("b!"), at("a"))
    assert [place for place, _ in transports["memory"].started] == ["a", "b!", "c!!"]
    assert transports["other"].started == [("d", pytest.approx(3 * STAGGER))]


async def test_a_loser_that_opens_a_stream_all_the_same_has_it_aborted() -> None:
    transports = slow({"late": (5.0, "stubborn"), "good": 0.1})
    assert await opened(transports, at("late"), at("good")) == "good"
    await asyncio.sleep(0)
    (loser,) = (stream for stream in transports["memory"].opened if stream.path == "late")
    with pytest.raises(StreamClosedError):
        await loser.send(b"x")


async def test_whoever_gives_up_leaves_nothing_open() -> None:
    transports = slow({"one": (30.0, "stubborn"), "two": 30.0})
    dialling = asyncio.create_task(opened(transports, at("one"), at("two"), within=60.0))
    await asyncio.sleep(1.0)
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    assert len(asyncio.all_tasks()) == 1
    (left,) = transports["memory"].opened
    with pytest.raises(StreamClosedError):
        await left.send(b"x")


async def test_when_none_answers_the_error_names_every_address() -> None:
    refused, impostor = PeerUnreachableError("refused"), PeerIdentityError("somebody else")
    transports = slow(
        {"a": (1.0, refused), "b": (0.5, impostor), "c": (0.1, AddressError("malformed")), "d": 99.0}
    )
    with pytest.raises(PeerUnreachableError, match=r"refused; somebody else; malformed$"):
        await opened(transports, at("a"), at("b"), at("c"))
    with pytest.raises(PeerIdentityError, match="somebody else"):
        await opened(transports, at("b"))
    with pytest.raises(PeerUnreachableError, match=r"somebody else; memory://d/.* did not answer within 3 s"):
        await opened(transports, at("d"), at("b"), within=3.0)
    with pytest.raises(DeadlineExceededError, match=r"memory://d/.* did not answer within 3 s"):
        await opened(transports, at("d"), within=3.0)


async def test_an_error_of_this_side_ends_the_race() -> None:
    transports = slow({"silent": 30.0, "closed": (0.1, StreamClosedError("this transport is closed"))})
    with pytest.raises(StreamClosedError):
        await opened(transports, at("silent"), at("closed"))
    assert asyncio.get_running_loop().time() == pytest.approx(STAGGER + 0.1)
    assert len(asyncio.all_tasks()) == 1


async def test_one_address_is_dialled_without_a_task_of_its_own() -> None:
    class Watching(Slow):
        async def open_stream(self, address: Address) -> Stream:
            assert asyncio.current_task() is caller
            return await super().open_stream(address)

    caller = asyncio.current_task()
    transports = {"memory": Watching(MemoryNetwork(), {"only": 1.0})}
    assert await opened(transports, at("only"), at("elsewhere", "other")) == "only"
    assert asyncio.get_running_loop().time() == 1.0
