"""Batches over several chains in memory, with exact arithmetic: shared by speed, redone after failures."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from chain_world import WHOLE, WIDTH, Server, Work, adapter_of, world_of

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import BatchCodecs
from swarmcore.client.autograd.rpc import MicroBatch
from swarmcore.errors import (
    AdapterNotFoundError,
    InputError,
    InvalidBatchError,
    MissingBlocksError,
    UnavailableError,
    UnknownCodecError,
)
from swarmcore.routing.chain import Chain
from swarmcore.routing.link_codec import LinkCodec, LinkDirection, Rung
from swarmcore.testing.rows import hidden_states, read_rows
from swarmcore.types import Span, short
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.tensors import ITEM_BYTES, Tensor, register_codec

pytestmark = pytest.mark.virtual_time


async def test_several_chains_give_what_one_model_gives() -> None:
    async with world_of("0:6", "6:12", "0:4", "4:12") as world:
        runner = world.runner()
        await Work.of().check(runner)
        assert runner.redone == 0
        assert all(server.passes for server in world.servers.values())


@pytest.mark.parametrize("keep", [True, False])
async def test_with_and_without_kept_activations(keep: bool) -> None:
    async with world_of("0:6", "6:12") as world:
        await Work.of(adapter=adapter_of()).check(world.runner(keep=keep))


async def test_work_is_shared_out_by_speed() -> None:
    async with world_of() as world:
        slow = await world.add("0:12", speed=50)
        fast = await world.add("0:12", speed=150)
        runner = world.runner(in_flight=2)
        runner.planner.worked = lambda stage, kind, tokens, seconds: None  # type: ignore[method-assign]
        await runner.forward(WHOLE, Work.of([(2,)] * 40).batches)
        assert (slow.passes, fast.passes) == (10, 30)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("nth", range(8))
async def test_a_server_dies_at_every_pass(direction: str, nth: int) -> None:
    async with world_of("0:6", "6:12", "0:6", "6:9", "9:12") as world:
        begun = 0
        deaths: list[asyncio.Task[None]] = []

        def begin(server: Server, at: str) -> None:
            nonlocal begun
            begun += at == direction
            if begun == nth + 1 and not deaths:
                deaths.append(asyncio.create_task(server.die()))

        world.begun = begin
        # The fallback for blocks 6:12 are two servers for one, so inner inputs have to be computed again.
        runner = world.runner(patience=5)
        await world.add("0:12", speed=1)
        await Work.of(adapter=adapter_of()).check(runner)
        assert len(deaths) == 1 or begun <= nth + 1
        await asyncio.gather(*deaths)


async def test_a_stage_that_two_servers_go_back_through_is_planned_once() -> None:
    async with world_of("0:12") as world:
        [whole] = world.servers.values()
        runner, work = world.runner(), Work.of([(3, 1)])
        contexts = await runner.forward(WHOLE, work.batches, needs_backward=True)
        await whole.die()
        for blocks in ("0:4", "4:8", "8:12"):
            await world.add(blocks)
        planned: list[Span] = []
        chain = runner.planner.chain

        def noted(span: Span, **options: Any) -> Chain:
            planned.append(span)
            return chain(span, **options)

        runner.planner.chain = noted  # type: ignore[method-assign]
        [back] = await runner.backward(contexts, work.gradients)
        [(_, gradients, _)] = await work.expected()
        assert back.gradients is not None and read_rows(back.gradients) == gradients
        assert planned == [WHOLE]


async def test_an_adapter_travels_once_to_each_server() -> None:
    async with world_of("0:6", "6:12") as world:
        work = Work.of([(2,)] * 12, adapter_of())
        sent: list[tuple[int, ...]] = []
        assert work.adapter is not None
        send = AdapterWeights.send

        async def counted(
            self: AdapterWeights, channel: object, blocks: Sequence[int], **options: object
        ) -> None:
            sent.append(tuple(blocks))
            await send(self, channel, blocks, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AdapterWeights, "send", counted)
            await work.check(world.runner())
        assert sorted(sent) == [tuple(range(6)), tuple(range(6, 12))]


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_codec_that_a_server_does_not_know_is_tried_once(direction: LinkDirection) -> None:
    async with world_of("0:6", "6:12") as world:
        ladder = (Rung("of tomorrow", 1),)
        links = LinkCodec(ladders={"activations": ladder, "gradients": ladder})
        for peer in world.servers:  # slow ones
            links.transferred(peer, direction, 1000, 1e6, 0)
            links.computed(peer, "activations", (1,), 1e-6, 0)
            links.computed(peer, "gradients", (1,), 1e-6, 0)
        runner = world.runner(codec="auto")
        runner.codecs = BatchCodecs("auto", links)
        await Work.of().check(runner)
        runner.codecs = BatchCodecs("of tomorrow")
        with pytest.raises(UnknownCodecError, match="of tomorrow"):
            await Work.of().check(runner)


class Backwards:
    """A codec that loses nothing."""

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(data)[::-1])

    decode = encode

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * ITEM_BYTES[dtype]


async def test_another_server_does_not_know_the_codec_of_the_forward_pass() -> None:
    register_codec("backwards", Backwards())
    async with world_of("0:12") as world:
        [first] = world.servers.values()
        links = LinkCodec(ladders={"activations": (Rung("backwards", 1),), "gradients": ()})
        links.transferred(first.peer, "up", 1000, 1e6, 0)
        links.computed(first.peer, "activations", (1,), 1e-6, 0)
        runner, work = world.runner(codec="auto"), Work.of()
        runner.codecs = BatchCodecs("auto", links)
        contexts = await runner.forward(WHOLE, work.batches, needs_backward=True)
        assert [stage.codec for context in contexts for stage in context.stages] == len(contexts) * [
            "backwards"
        ]

        second, refusals = await world.add("0:12"), 0

        async def decode(tensor: Tensor) -> Tensor:
            nonlocal refusals
            if tensor.codec == "backwards":
                refusals += 1
                raise UnknownCodecError("codec 'backwards' is not known here")
            return tensor.decode()

        second.engine.executor.decode = decode  # type: ignore[method-assign]
        await first.die()
        backs = await runner.backward(contexts, work.gradients)
        for back, (_, gradients, _) in zip(backs, await work.expected(), strict=True):
            assert back.gradients is not None and read_rows(back.gradients) == gradients
        assert refusals


async def test_patience_ends_when_nobody_has_the_blocks() -> None:
    async with world_of("0:6") as world:
        before = asyncio.get_running_loop().time()
        with pytest.raises(MissingBlocksError, match=r"through block 6 .* hold other blocks: .* 0:6"):
            await world.runner(patience=3).forward(WHOLE, Work.of().batches)
        assert asyncio.get_running_loop().time() - before == pytest.approx(3)


async def test_when_all_have_gone_it_says_so_and_why(caplog: pytest.LogCaptureFixture) -> None:
    async with world_of("0:6", "6:12") as world:
        runner, work = world.runner(patience=3), Work.of()
        contexts = await runner.forward(WHOLE, work.batches, needs_backward=True)
        await next(server for server in world.servers.values() if server.engine.executor.span.start).die()
        with pytest.raises(MissingBlocksError, match="through block 6") as error:
            await runner.backward(contexts, work.gradients)
        assert isinstance(error.value.__cause__, UnavailableError)
        assert [record.levelname for record in caplog.records if "waits" in record.message] == ["WARNING"]


@pytest.mark.parametrize(
    "options", [{"micro_batch_tokens": 0}, {"in_flight": 0}, {"timeout": 0.0}, {"patience": -1.0}]
)
async def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        PassOptions(**options)


async def test_a_server_that_comes_late_is_waited_for() -> None:
    async with world_of("0:6") as world:
        work = asyncio.create_task(Work.of().check(world.runner(patience=30)))
        await asyncio.sleep(5)
        assert not work.done()
        await world.add("6:12")
        await work


async def test_what_no_server_can_take_is_refused_at_once() -> None:
    async with world_of("0:12", "0:12") as world:
        poisoned = hidden_states([[float("nan")] * WIDTH] * 2)
        before = asyncio.get_running_loop().time()
        with pytest.raises(InvalidBatchError, match="finite"):
            await world.runner().forward(WHOLE, [(MicroBatch((2,)), poisoned)])
        contexts = await world.runner().forward(
            WHOLE, [(MicroBatch((2,)), hidden_states([[1.0] * WIDTH] * 2))]
        )
        with pytest.raises(InvalidBatchError, match="finite"):
            await world.runner().backward(contexts, [poisoned])
        assert asyncio.get_running_loop().time() - before < 1


async def test_batches_that_are_too_large_or_want_an_unknown_adapter_find_nobody() -> None:
    async with world_of("0:12") as world:
        large = Work.of([(65,)])
        with pytest.raises(InvalidBatchError, match="65 tokens, and the servers run 64 at most") as error:
            await world.runner().forward(WHOLE, large.batches)
        assert error.value.pass_tokens == 64
        unknown = Work.of([(2,)], AdapterWeights(AdapterName(name="poems")))
        with pytest.raises((MissingBlocksError, AdapterNotFoundError)):
            await world.runner(patience=0).forward(WHOLE, unknown.batches)


async def test_batches_pass_by_servers_that_cannot_train_or_take_no_adapters() -> None:
    async with world_of("0:12") as world:
        (able,) = world.servers.values()
        unable = await world.add("0:12", speed=1000.0, able=())
        frozen = await world.add("0:12", speed=1000.0, able=("training",))
        await Work.of(adapter=adapter_of()).check(world.runner())
        assert able.passes and not unable.passes and not frozen.passes
        await able.node.close()
        await able.registry.withdraw()
        await Work.of().check(world.runner())
        assert frozen.passes and not unable.passes
        with pytest.raises(MissingBlocksError, match="no training or no adapters: ") as refused:
            await world.runner(patience=0).forward(WHOLE, Work.of(adapter=adapter_of()).batches)
        for server in unable, frozen:
            assert f"{short(server.node.peer)} 0:12 (fake/f32)" in refused.value.message


async def test_cancelling_leaves_nothing_behind() -> None:
    async with world_of("0:6", "6:12") as world:
        runner = world.runner()
        for moment in range(0, 40, 3):
            work = asyncio.create_task(Work.of(adapter=adapter_of()).check(runner))
            for _ in range(moment):
                await asyncio.sleep(0)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        while any(server.service.under_way for server in world.servers.values()):
            await asyncio.sleep(0.01)
        await Work.of().check(runner)
