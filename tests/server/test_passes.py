"""Forward and backward passes over the wire: real server and client code, exact arithmetic for blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
from memory_swarm import Server, Swarm, swarm_of
from small_adapters import adapter_tensors, weights_of

from swarmcore.client.adapter_weights import AdapterWeights
from swarmcore.client.passes import Batch, backward, forward
from swarmcore.errors import (
    AdapterNotFoundError,
    ConnectionLostError,
    DeadlineExceededError,
    InvalidBatchError,
    ModelMismatchError,
    ServerDrainingError,
    SpanError,
    SwarmError,
    UnknownCodecError,
)
from swarmcore.executor.pass_runner import PassLimits
from swarmcore.executor.passes import BatchPass, SequenceBatch
from swarmcore.routing.chain import Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.method import Protocol
from swarmcore.server import pass_channel
from swarmcore.server.adapters import Weights
from swarmcore.server.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values, tensor_of
from swarmcore.types import Span
from swarmcore.wire import passes as wire
from swarmcore.wire.tensors import Tensor

LENGTHS = (3, 1, 4)
KEEP = "0123456789abcdef" * 2

pytestmark = pytest.mark.virtual_time


def some_rows(seed: int, count: int = sum(LENGTHS)) -> Rows:
    rng = random.Random(seed)
    return [[rng.randrange(-512, 512) / 512 for _ in range(4)] for _ in range(count)]


def stage(server: Server, blocks: str = "") -> Stage:
    return Stage(server.info(), Span.parse(blocks) if blocks else server.executor.span)


async def alone(
    rows: Rows,
    gradients: Rows,
    lengths: tuple[int, ...] = LENGTHS,
    span: str = "0:12",
    weights: AdapterWeights | None = None,
) -> tuple[Rows, Rows, dict[str, list[float]]]:
    """Outputs, gradients of the inputs and of the weights, without any network."""
    executor = CountingExecutor()
    adapter = None
    if weights is not None:
        tensors = [tensor for each in weights.tensors.values() for tensor in each]
        adapter = await executor.load_adapter(tensors, weights.scaling)
    batch = SequenceBatch(Span.parse(span), lengths, hidden_states(rows), adapter)
    there = executor.forward(batch)
    back = executor.backward(batch, hidden_states(gradients), weights=adapter is not None)
    work: BatchPass
    for work in (there, back):
        while not await work.advance(10**6):
            pass
    assert back.gradients is not None
    named = {tensor.name: read_values(tensor) for tensor in back.weights}
    return read_rows(there.outputs), read_rows(back.gradients), named


async def quiet(swarm: Swarm) -> None:
    """Wait until nothing is left of any pass but kept activations; fail when something stays."""
    async with asyncio.timeout(30):
        for server in swarm.servers:
            queue = server.engine.passes.queue
            while (
                server.passes.under_way
                or len(queue)
                or queue.admitted_tokens
                or server.adapters.in_use
                or len(server.executor.passes) != len(server.engine.passes.kept)
            ):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def one_server(delay: float = 0.0, **options: Any) -> AsyncIterator[tuple[Swarm, Server]]:
    async with swarm_of(delay=delay) as swarm:
        server = await swarm.add("0:12", **options)
        yield swarm, server
        await quiet(swarm)


async def test_there_and_back_over_two_servers() -> None:
    rows, up = some_rows(1), some_rows(2)
    async with swarm_of("0:5", "5:12") as swarm:
        first, second = (stage(server) for server in swarm.servers)
        batch, model, node = Batch(LENGTHS), COUNTING_MODEL, swarm.client
        middle = await forward(node, model, first, batch, hidden_states(rows))
        end = await forward(node, model, second, batch, middle.outputs, keep=KEEP)
        assert (middle.kept, end.kept) == (False, True)
        half = await backward(node, model, second, batch, middle.outputs, hidden_states(up), kept=KEEP)
        assert half.gradients is not None
        whole = await backward(node, model, first, batch, hidden_states(rows), half.gradients)
        assert whole.gradients is not None
        outputs, gradients, _ = await alone(rows, up)
        assert read_rows(end.outputs) == outputs
        assert read_rows(whole.gradients) == gradients
        assert [server.engine.stats.kept_hits for server in swarm.servers] == [0, 1]
        await quiet(swarm)


async def test_rows_travel_in_pieces_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_channel, "PIECE_BYTES", 100)
    monkeypatch.setattr("swarmcore.client.passes.PIECE_BYTES", 100)
    rows, up = some_rows(1, 50), some_rows(2, 50)
    async with one_server() as (swarm, server):
        sizes = _message_sizes(monkeypatch)
        here, batch = stage(server), Batch((20, 30))
        there = await forward(swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows))
        back = await backward(
            swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows), hidden_states(up)
        )
        assert back.gradients is not None
        outputs, gradients, _ = await alone(rows, up, (20, 30))
        assert (read_rows(there.outputs), read_rows(back.gradients)) == (outputs, gradients)
        assert max(sizes) < 512 < 50 * 16


def _message_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    send = Channel.send

    async def counted(channel: Channel, record: Any, *tensors: Tensor) -> None:
        sizes.append(sum(tensor.data.nbytes for tensor in tensors))
        await send(channel, record, *tensors)

    monkeypatch.setattr(Channel, "send", counted)
    return sizes


async def test_results_come_encoded_as_asked_and_unwanted_gradients_do_not_come() -> None:
    rows, up = some_rows(1), some_rows(2)
    async with one_server() as (swarm, server):
        here, batch = stage(server), Batch(LENGTHS)
        coded = await backward(
            swarm.client,
            COUNTING_MODEL,
            here,
            batch,
            hidden_states(rows),
            hidden_states(up),
            codec="raw+zstd",
            answer_codec="raw+zstd",
        )
        assert coded.gradients is not None
        assert read_rows(coded.gradients) == (await alone(rows, up))[1]
        none = await backward(
            swarm.client,
            COUNTING_MODEL,
            here,
            batch,
            hidden_states(rows),
            hidden_states(up),
            wants_inputs=False,
        )
        assert none.gradients is None


# --- adapters ----------------------------------------------------------------------------------------


async def test_an_adapter_travels_once_and_not_with_every_micro_batch() -> None:
    rows, up = some_rows(1), some_rows(2)
    mine = weights_of(adapter_tensors(seed=3), version="a" * 32)
    async with one_server() as (swarm, server):
        here, batch = stage(server), Batch(LENGTHS, mine)
        outputs, gradients, named = await alone(rows, up, weights=mine)
        results = await asyncio.gather(
            *(forward(swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows)) for _ in range(10))
        )
        assert all(read_rows(result.outputs) == outputs for result in results)
        for _ in range(3):
            back = await backward(
                swarm.client,
                COUNTING_MODEL,
                here,
                batch,
                hidden_states(rows),
                hidden_states(up),
                wants_weights=True,
            )
            assert back.gradients is not None and read_rows(back.gradients) == gradients
            assert {tensor.name: read_values(tensor) for tensor in back.weights} == named
        assert server.adapters.counters["adapters_asked"] == 1
        newer = weights_of(adapter_tensors(seed=4), version="b" * 32)
        changed = await forward(
            swarm.client, COUNTING_MODEL, here, attrs.evolve(batch, adapter=newer), hidden_states(rows)
        )
        assert read_rows(changed.outputs) == (await alone(rows, up, weights=newer))[0] != outputs
        assert server.adapters.counters["adapters_asked"] == 2


async def test_two_clients_with_adapters_of_one_version_each_get_their_own() -> None:
    rows, up = some_rows(1), some_rows(2)
    mine, yours = (weights_of(adapter_tensors(seed=seed), version="c" * 32) for seed in (5, 6))
    async with one_server() as (swarm, server):
        stranger = await swarm.another_client()
        here = stage(server)
        results = await asyncio.gather(
            *(
                forward(node, COUNTING_MODEL, here, Batch(LENGTHS, weights), hidden_states(rows))
                for node, weights in ((swarm.client, mine), (stranger, yours))
                for _ in range(3)
            )
        )
        expected = [(await alone(rows, up, weights=weights))[0] for weights in (mine, yours)]
        assert [read_rows(result.outputs) for result in results] == [expected[0]] * 3 + [expected[1]] * 3
        assert server.adapters.counters["adapters_asked"] == 2


async def test_an_adapter_of_the_server_is_called_by_name() -> None:
    rows, up = some_rows(1), some_rows(2)
    named = weights_of(adapter_tensors(seed=7), version="d" * 32)
    async with one_server() as (swarm, server):

        async def read(span: Span) -> Weights:
            return Weights(adapter_tensors(seed=7), named.scaling)

        await server.adapters.load_named("poet", read)
        here = stage(server)
        assert here.server.adapters == ("poet",)
        asked = AdapterWeights(wire.AdapterName(name="poet"))
        result = await forward(swarm.client, COUNTING_MODEL, here, Batch(LENGTHS, asked), hidden_states(rows))
        assert read_rows(result.outputs) == (await alone(rows, up, weights=named))[0]
        unknown = AdapterWeights(wire.AdapterName(name="prose"))
        with pytest.raises(AdapterNotFoundError, match="it serves poet"):
            await forward(swarm.client, COUNTING_MODEL, here, Batch(LENGTHS, unknown), hidden_states(rows))


# --- refusals ----------------------------------------------------------------------------------------


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
    ],
)
async def test_an_opening_that_cannot_work_is_refused(
    changes: dict[str, Any], error: type[SwarmError], says: str
) -> None:
    async with one_server(limits=PassLimits(max_tokens=40)) as (swarm, server):
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
                Batch(LENGTHS),
                hidden_states(some_rows(1)),
                hidden_states(up),
            )


async def test_a_draining_server_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    rows, up = some_rows(1), some_rows(2)
    async with one_server() as (swarm, server):
        server.executor.pass_seconds = 0.1
        here, batch = stage(server), Batch(LENGTHS)
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
                Batch(LENGTHS, mine),
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
            swarm.client, COUNTING_MODEL, stage(server), Batch(LENGTHS, mine), hidden_states(some_rows(1))
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
            forward(swarm.client, COUNTING_MODEL, stage(server), Batch(LENGTHS), hidden_states(some_rows(1)))
        )
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        await server.kill()
        with pytest.raises((ConnectionLostError, ServerDrainingError)):
            await work
        assert asyncio.get_running_loop().time() - began < 15
