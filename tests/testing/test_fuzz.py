"""The fuzzer finds what it is for, and nothing in a server of ours."""

from __future__ import annotations

import logging
import random

import attrs
import pytest

from swarmcore.testing.fuzz.__main__ import fuzz
from swarmcore.testing.fuzz.hostile_peers import HostilePeers, RecordMaker, mutate
from swarmcore.testing.fuzz.target import FuzzFailure, fuzz_target
from swarmcore.types import PeerId
from swarmcore.wire import messages
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Caller, Method


async def test_a_server_stands_a_second_of_it() -> None:
    sent = await fuzz(1.0, seed=5)
    assert sent["streams"] > 0
    assert sent["messages"] > 0


async def test_a_handler_that_fails_is_found(caplog: pytest.LogCaptureFixture) -> None:
    broken = Method("/test/broken/1", Ping, Pong)

    async def fail(request: Ping, caller: Caller) -> Pong:
        raise ZeroDivisionError

    async with fuzz_target() as target:
        target.server.node.serve(broken, fail)
        with pytest.raises(ExceptionGroup) as caught:
            await HostilePeers(target, random.Random(1)).run(30.0)
        assert caught.group_contains(FuzzFailure, match="handler failed")
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_records_of_every_type_are_made_and_mutated() -> None:
    maker = RecordMaker(random.Random(1), {"session": ("s",)}, (PeerId("peer"),))
    for record_type in vars(messages).values():
        if attrs.has(record_type):
            made = [maker.make(record_type) for _ in range(20)]
            assert all(isinstance(one, record_type) for one in made)
    assert len({mutate(b"some bytes", random.Random(seed)) for seed in range(100)}) > 50
