"""What servers refuse of passes, and clients and servers that leave in the middle of one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from memory_swarm import Server, Swarm, swarm_of
from pass_swarm import KEEP, LENGTHS, alone, one_server, quiet, some_rows, stage
from small_adapters import adapter_tensors, weights_of

from swarmcore.client.autograd.rpc import MicroBatch, backward, forward
from swarmcore.engine.training import TrainingLimits
from swarmcore.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    InvalidBatchError,
    ModelMismatchError,
    ServerDrainingError,
    SpanError,
    SwarmError,
    UnknownCodecError,
)
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.rows import hidden_states, read_rows, tensor_of
from swarmcore.wire import forward_backward as wire
from swarmcore.wire.method import Protocol
from swarmcore.wire.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL
from swarmcore.wire.tensors import Tensor

pytestmark = pytest.mark.virtual_time


def opening(**changes: Any) -> wire.OpenForward:
    given = wire.OpenForward(COUNTING_MODEL.fingerprint, 0, 12, LENGTHS)
    return attrs.evolve(given, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"fingerprint": "other"}, ModelMismatchError, "other weights"),
        ({"start": 5, "end": 13}, SpanError, "holds 0:12"),
        ({"start": 5, "end": 5}, SpanError, "holds 0:12"),
        ({"lengths": ()}, InvalidBatchError, "no tokens"),
        ({"lengths": (5, 0)}, InvalidBatchError, "no tokens"),
        ({"lengths": (5, -2)}, InvalidBatchError, "no tokens"),
        ({"lengths": (20, 21)}, InvalidBatchError, "runs 40 at most"),
        ({"lengths": (2**62, 2**62)}, InvalidBatchError, "runs 40 at most"),
        ({"codec": "mp3"}, UnknownCodecError, "not known"),
        ({"keep": "x"}, InvalidBatchError, "32 hex digits"),
        ({"deadline": float("nan")}, InvalidBatchError, "more than 0"),
        ({"deadline": -1.0}, InvalidBatchError, "more than 0"),
        ({"padding": True}, InvalidBatchError, "computes no padding"),  # as the counting executor
    ],
)
async def test_an_opening_that_cannot_work_is_refused(
    changes: dict[str, Any], error: type[SwarmError], says: str
) -> None:
    async with one_server(limits=TrainingLimits(max_tokens=40)) as (swarm, server):
        for protocol, first in (
            (FORWARD_PROTOCOL, opening(**changes)),
            (BACKWARD_PROTOCOL, _back(opening(**changes))),
        ):
            with pytest.raises(error, match=says):
                await converse(swarm, server, protocol, first)
        assert not server.executor.units


def _back(first: wire.OpenForward) -> wire.OpenBackward:
    return wire.OpenBackward(
        first.fingerprint,
        first.start,
        first.end,
        first.lengths,
        codec=first.codec,
        deadline=first.deadline,
        kept=first.keep,
        padding=first.padding,
    )


async def converse(
    swarm: Swarm, server: Server, protocol: Protocol, first: Any, *messages: tuple[Any, Tensor]
) -> Any:
    """Open a channel, send what is given, and wait for an answer."""
    async with await swarm.client.open(server.node.addresses, protocol, first) as channel:
        for record, tensor in messages:
            await channel.send(record, tensor)
        while True:
            message = await channel.receive()
            if isinstance(message.record, wire.ForwardDone | wire.BackwardDone):
                return message.record


def pieces(*rows: tuple[int, int], kind: str = "inputs") -> list[tuple[Any, Tensor]]:
    """Rows ``first`` to ``last`` of a batch, a message each."""
    whole = some_rows(1, 40)
    return [(wire.Rows(kind, first), hidden_states(whole[first:last])) for first, last in rows]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (pieces((0, 9)), "1 to 8 rows"),
        (pieces((0, 4), (4, 9)), "1 to 4 rows"),
        (pieces((0, 4), (0, 4)), "from 0 on came where those from 4"),
        (pieces((4, 8)), "from 4 on came where those from 0"),
        (pieces((0, 4), (5, 8)), "from 5 on came where those from 4"),
        (pieces((0, 8), kind="gradients"), "more 'gradients' than were asked for"),
        (pieces((0, 4), kind="outputs"), "more 'outputs' than were asked for"),
        ([(wire.Rows("inputs", 0), tensor_of("hidden", [0.0] * 24, (8, 3)))], "4 values in each"),
        ([(wire.Rows("inputs", 0), tensor_of("hidden", [0.0] * 32, (32,)))], "4 values in each"),
        ([(wire.Rows("inputs", 0), tensor_of("hidden", [], (0, 4)))], "1 to 8 rows"),
        (
            [
                pieces((0, 4))[0],
                (wire.Rows("inputs", 4), hidden_states(some_rows(1, 4), "float16")),
            ],
            "expected float32",
        ),
        (
            [(wire.Rows("inputs", 0), Tensor("hidden", "int8", (8, 4), memoryview(bytes(32))))],
            "are 'int8'",
        ),
        (
            [(wire.Rows("inputs", 0), hidden_states([[float("nan")] * 4] * 8))],
            "not finite",
        ),
    ],
)
async def test_rows_that_are_not_those_announced_are_refused(
    messages: Sequence[tuple[Any, Tensor]], says: str
) -> None:
    async with one_server() as (swarm, server):
        with pytest.raises(InvalidBatchError, match=says):
            await converse(swarm, server, FORWARD_PROTOCOL, opening(), *messages)


async def test_poisoned_gradients_are_refused_with_the_reason() -> None:
    async with one_server() as (swarm, server):
        up = some_rows(2)
        up[5][0] = float("inf")
        with pytest.raises(InvalidBatchError, match="gradients of the outputs hold values that are not"):
            await backward(
                swarm.client,
                COUNTING_MODEL,
                stage(server),
                MicroBatch(LENGTHS),
                hidden_states(some_rows(1)),
                hidden_states(up),
            )


async def test_a_draining_server_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    rows, up = some_rows(1), some_rows(2)
    async with one_server() as (swarm, server):
        server.executor.pass_seconds = 0.1
        here, batch = stage(server), MicroBatch(LENGTHS)
        going = asyncio.create_task(
            backward(swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows), hidden_states(up))
        )
        await asyncio.sleep(1)
        draining = asyncio.create_task(server.passes.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(ServerDrainingError):
            await forward(swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows))
        result = await going
        assert result.gradients is not None and read_rows(result.gradients) == (await alone(rows, up))[1]
        began = asyncio.get_running_loop().time()
        await draining
        assert asyncio.get_running_loop().time() - began < 1


# --- endings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(24))
async def test_a_client_that_is_cancelled_leaves_nothing(moment: int) -> None:
    mine = weights_of(adapter_tensors(seed=3), version="a" * 32)
    async with one_server(delay=0.02) as (swarm, server):
        server.executor.pass_seconds = 0.002
        work = asyncio.create_task(
            backward(
                swarm.client,
                COUNTING_MODEL,
                stage(server),
                MicroBatch(LENGTHS, mine),
                hidden_states(some_rows(1)),
                hidden_states(some_rows(2)),
                wants_weights=True,
            )
        )
        await asyncio.sleep(moment * 0.02)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await quiet(swarm)
        # And the server is as good as before.
        result = await forward(
            swarm.client,
            COUNTING_MODEL,
            stage(server),
            MicroBatch(LENGTHS, mine),
            hidden_states(some_rows(1)),
        )
        assert read_rows(result.outputs) == (await alone(some_rows(1), some_rows(2), weights=mine))[0]


async def test_a_client_that_vanishes_leaves_nothing() -> None:
    async with one_server() as (swarm, server):
        server.executor.pass_seconds = 0.1
        channel = await swarm.client.open(server.node.addresses, FORWARD_PROTOCOL, opening(keep=KEEP))
        await channel.send(*pieces((0, 8))[0])
        await asyncio.sleep(1)
        assert len(server.executor.passes) == 1
        channel.abort("gone")
        await quiet(swarm)
        assert not server.executor.passes
        idle = await swarm.client.open(server.node.addresses, FORWARD_PROTOCOL, opening(deadline=1e9))
        with pytest.raises(DeadlineExceededError, match="nothing for 60 s"):
            await idle.receive()
        await idle.close()
        silent = await swarm.client.open(server.node.addresses, FORWARD_PROTOCOL, opening(deadline=5.0))
        with pytest.raises(DeadlineExceededError, match="8 tokens"):
            await silent.receive()
        await silent.close()


async def test_a_server_that_dies_in_the_middle_is_an_error_at_once() -> None:
    async with swarm_of("0:12") as swarm:
        [server] = swarm.servers
        server.executor.pass_seconds = 0.1
        work = asyncio.create_task(
            forward(
                swarm.client, COUNTING_MODEL, stage(server), MicroBatch(LENGTHS), hidden_states(some_rows(1))
            )
        )
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        await server.kill()
        with pytest.raises((ConnectionLostError, ServerDrainingError)):
            await work
        assert asyncio.get_running_loop().time() - began < 15
