"""Forward and backward passes over the wire: real server and client code, exact arithmetic for blocks."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest
from memory_swarm import swarm_of
from pass_swarm import KEEP, LENGTHS, alone, one_server, quiet, some_rows, stage
from small_adapters import adapter_tensors, weights_of

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.rpc import MicroBatch, backward, forward
from swarmcore.engine.training import TrainingLimits, TrainingRequest
from swarmcore.errors import AdapterNotFoundError
from swarmcore.executor.base import TrainingBatch
from swarmcore.rpc.channel import Channel
from swarmcore.server import forward_backward_channel as pass_channel
from swarmcore.server.adapters import Weights
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.faulty import Faults
from swarmcore.testing.rows import hidden_states, read_rows, read_values
from swarmcore.types import Span
from swarmcore.wire import forward_backward as wire
from swarmcore.wire.tensors import Tensor

pytestmark = pytest.mark.virtual_time


async def test_there_and_back_over_two_servers() -> None:
    rows, up = some_rows(1), some_rows(2)
    async with swarm_of("0:5", "5:12") as swarm:
        first, second = (stage(server) for server in swarm.servers)
        batch, model, node = MicroBatch(LENGTHS), COUNTING_MODEL, swarm.client
        middle = await forward(node, model, first, batch, hidden_states(rows))
        end = await forward(node, model, second, batch, middle.outputs, keep=KEEP)
        assert (middle.kept, end.kept) == (False, True)
        half = await backward(node, model, second, batch, middle.outputs, hidden_states(up), kept_as=KEEP)
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
    monkeypatch.setattr("swarmcore.client.autograd.rpc.PIECE_BYTES", 100)
    rows, up = some_rows(1, 50), some_rows(2, 50)
    async with one_server() as (swarm, server):
        sizes = _message_sizes(monkeypatch)
        here, batch = stage(server), MicroBatch((20, 30))
        there = await forward(swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows))
        back = await backward(
            swarm.client, COUNTING_MODEL, here, batch, hidden_states(rows), hidden_states(up)
        )
        assert back.gradients is not None
        outputs, gradients, _ = await alone(rows, up, (20, 30))
        assert (read_rows(there.outputs), read_rows(back.gradients)) == (outputs, gradients)
        assert max(sizes) < 512 < 50 * 16


async def test_pieces_come_in_time_when_many_passes_share_a_slow_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def echo(
        turn: TrainingRequest, batch: TrainingBatch, *, keep: str = ""
    ) -> tuple[Tensor, bool, float]:
        return batch.hidden, False, 0.1

    monkeypatch.setattr(TrainingRequest, "forward", echo)
    rows = 2**16  # a MiB of them
    given = Tensor("hidden", "float32", (rows, 4), memoryview(bytes(rows * 16)))
    async with one_server(limits=TrainingLimits(max_tokens=rows)) as (swarm, server):
        swarm.client_transport.faults = Faults(rate=2**15)
        batch = MicroBatch((rows,), timeout=900)
        results = await asyncio.gather(
            *(forward(swarm.client, COUNTING_MODEL, stage(server), batch, given) for _ in range(8))
        )
        assert all(result.outputs.shape == given.shape for result in results)
        assert asyncio.get_running_loop().time() > 8 * rows * 16 / 2**15


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
        here, batch = stage(server), MicroBatch(LENGTHS)
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
        here, batch = stage(server), MicroBatch(LENGTHS, mine)
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
                forward(node, COUNTING_MODEL, here, MicroBatch(LENGTHS, weights), hidden_states(rows))
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
        asked = MicroBatch(LENGTHS, AdapterWeights(wire.AdapterName(name="poet")))
        result = await forward(swarm.client, COUNTING_MODEL, here, asked, hidden_states(rows))
        assert read_rows(result.outputs) == (await alone(rows, up, weights=named))[0]
        unknown = MicroBatch(LENGTHS, AdapterWeights(wire.AdapterName(name="prose")))
        with pytest.raises(AdapterNotFoundError, match="it serves poet"):
            await forward(swarm.client, COUNTING_MODEL, here, unknown, hidden_states(rows))
