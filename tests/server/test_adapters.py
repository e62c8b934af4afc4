"""The store of adapters: who has to send what, how often, and what goes when there is no room."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack

import attrs
import pytest
from small_adapters import WIDTH, adapter_tensors

from swarmcore.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConnectionLostError,
    DeadlineExceededError,
    ProtocolError,
    RemoteFaultError,
    ResourceLimitError,
    ServerMemoryError,
    SwarmError,
)
from swarmcore.executor.base import Adapter
from swarmcore.resources import Bounds, Machine, Resource, ResourceLimits, ResourceManager
from swarmcore.server import adapters as module
from swarmcore.server.adapters import ARRIVAL_TIMEOUT, AdapterStore, AskForWeights, Weights, WeightsIntake
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.forward_backward import CountingAdapter
from swarmcore.testing.rows import tensor_of
from swarmcore.types import PeerId, Span
from swarmcore.wire.forward_backward import AdapterName, AdapterPart
from swarmcore.wire.tensors import Tensor

ALICE, BOB, CAROL = map(PeerId, ("alice", "bob", "carol"))
WHOLE = Span(0, 12)
NBYTES = sum(tensor.decoded_nbytes for tensor in adapter_tensors())

pytestmark = pytest.mark.virtual_time


def version(number: int) -> AdapterName:
    return AdapterName(version=f"{number:032x}")


class Client:
    """Answers when asked, and counts how often it was."""

    def __init__(self, seed: int = 0, *, takes: float = 0.0, fails: SwarmError | None = None) -> None:
        self.asked: list[Span] = []
        self.seed, self.takes, self.fails = seed, takes, fails

    async def __call__(self, span: Span, max_bytes: int) -> Weights:
        self.asked.append(span)
        await asyncio.sleep(self.takes)
        if self.fails is not None:
            raise self.fails
        blocks = [block for block in (2, 5) if block in span]
        return Weights(adapter_tensors(self.seed, blocks), 1.0)


def store(budget: int = 10 * NBYTES) -> AdapterStore:
    return AdapterStore(CountingExecutor(), budget)


async def get(
    where: AdapterStore, peer: PeerId, name: AdapterName, ask: AskForWeights, span: Span = WHOLE
) -> Adapter | None:
    async with where.obtain(peer, name, span, ask) as adapter:
        return adapter


async def test_many_that_need_one_adapter_ask_for_it_once() -> None:
    where, asked = store(), [Client(takes=1.0) for _ in range(5)]
    found = await asyncio.gather(*(get(where, ALICE, version(1), ask) for ask in asked))
    assert len({id(adapter) for adapter in found}) == 1
    assert [len(client.asked) for client in asked] == [1, 0, 0, 0, 0]
    # Part of what is here needs no asking either; more than is here does.
    assert await get(where, ALICE, version(1), asked[1], Span(3, 6)) is found[0]
    assert (where.counters["adapters_asked"], where.in_use) == (1, 0)


async def test_when_the_one_that_was_asked_fails_another_is() -> None:
    where = store()
    gone, slow, good = (
        Client(takes=1.0, fails=ConnectionLostError("gone")),
        Client(takes=2 * ARRIVAL_TIMEOUT),
        Client(),
    )
    results = await asyncio.gather(
        *(get(where, ALICE, version(1), ask) for ask in (gone, slow, good)), return_exceptions=True
    )
    assert [type(result) for result in results] == [
        ConnectionLostError,
        DeadlineExceededError,
        CountingAdapter,
    ]
    first = asyncio.create_task(get(where, ALICE, version(2), Client(takes=9.0)))
    second = asyncio.create_task(get(where, ALICE, version(2), good))
    await asyncio.sleep(1)
    first.cancel()
    assert isinstance(await second, CountingAdapter)
    assert where.in_use == 0


async def test_weights_that_will_not_do_are_not_asked_for_again_by_those_who_wait() -> None:
    where, others = store(), [Client() for _ in range(3)]
    bad = Client(takes=1.0, fails=AdapterError("too large"))
    results = await asyncio.gather(
        *(get(where, ALICE, version(1), ask) for ask in (bad, *others)), return_exceptions=True
    )
    assert [type(result) for result in results] == [AdapterError] * 4
    assert len({id(result) for result in results}) == 4
    assert not any(client.asked for client in others)
    assert await get(where, ALICE, version(1), others[0]) is not None


async def test_another_peer_gets_nothing_of_it() -> None:
    where, alice, bob = store(), Client(seed=1), Client(seed=2)
    mine, yours = await get(where, ALICE, version(1), alice), await get(where, BOB, version(1), bob)
    assert mine is not yours and (len(alice.asked), len(bob.asked)) == (1, 1)


async def test_the_least_recently_used_goes_first_and_what_is_used_stays() -> None:
    where, client = store(3 * NBYTES), Client()
    refs = [weakref.ref(await get(where, ALICE, version(n), client)) for n in range(3)]
    await get(where, ALICE, version(0), client)
    assert len(client.asked) == 3 and where.nbytes == 3 * NBYTES
    async with where.obtain(ALICE, version(2), WHOLE, client):
        await get(where, BOB, version(9), client)
        gc.collect()
        assert [ref() is None for ref in refs] == [False, True, False]
        await get(where, BOB, version(8), client)
        gc.collect()
        assert [ref() is None for ref in refs] == [True, True, False]
    assert where.nbytes <= where.budget and where.counters["adapters_dropped"] == 2


async def test_when_all_room_is_in_use_the_client_is_told_to_wait() -> None:
    where, client = store(4 * NBYTES), Client()
    async with AsyncExitStack() as used:
        for peer in (ALICE, CAROL):
            for number in range(2):
                await used.enter_async_context(where.obtain(peer, version(number), WHOLE, client))
        with pytest.raises(ServerMemoryError, match=f"of the {4 * NBYTES} that this server has"):
            await get(where, BOB, version(9), client)
    assert await get(where, BOB, version(9), client) is not None


async def test_one_client_uses_half_of_the_room_at_most() -> None:
    where, client = store(4 * NBYTES), Client()
    async with AsyncExitStack() as used:
        for number in range(2):
            await used.enter_async_context(where.obtain(ALICE, version(number), WHOLE, client))
        with pytest.raises(ServerMemoryError, match="in use by you"):
            await get(where, ALICE, version(9), client)
        await used.enter_async_context(where.obtain(BOB, version(9), WHOLE, client))
    for number in range(4):
        await get(where, ALICE, version(number), client)
    assert where.nbytes == 4 * NBYTES, "what nobody uses makes room anyway"


async def test_what_could_never_fit_is_refused_for_good() -> None:
    with pytest.raises(AdapterError, match="a smaller one"):
        await get(store(2 * NBYTES - 2), ALICE, version(1), Client())


async def test_old_versions_of_one_peer_do_not_pile_up() -> None:
    where, client = store(1000 * NBYTES), Client()
    for number in range(50):
        await get(where, ALICE, version(number), client)
    assert where.nbytes == module.MAX_OF_ONE_PEER * NBYTES


async def test_a_server_that_takes_none_says_so() -> None:
    with pytest.raises(AdapterNotFoundError, match="takes no adapters"):
        await get(store(0), ALICE, version(1), Client())


async def test_blocks_without_weights_are_not_asked_for_again() -> None:
    where, client = store(), Client()
    for _ in range(2):
        assert await get(where, ALICE, version(1), client, Span(6, 12)) is None
    assert client.asked == [Span(6, 12)]


async def test_what_an_executor_raises_is_translated() -> None:
    where = store()

    class Broken(CountingExecutor):
        async def load_adapter(self, tensors: object, scaling: float) -> CountingAdapter:
            raise RuntimeError("boom")

    where._executor = Broken()
    with pytest.raises(RemoteFaultError):
        await get(where, ALICE, version(1), Client())


async def test_named_adapters_follow_the_blocks() -> None:
    executor = CountingExecutor(Span(0, 6))
    where, read = AdapterStore(executor, 0), Client()
    await where.load_named("poet", lambda span: read(span, 0))
    async with where.obtain(ALICE, AdapterName(name="poet"), Span(0, 6), Client()) as adapter:
        assert adapter is not None and adapter.span == Span(2, 6)
    await executor.change_span(Span(4, 12))
    await where.change_span()
    assert read.asked == [Span(0, 6), Span(4, 12)] and where.names == ("poet",)
    read.fails = AdapterError("the file is gone")
    await where.change_span()
    with pytest.raises(AdapterNotFoundError, match="serves none"):
        await get(where, ALICE, AdapterName(name="poet"), Client())


def intake(
    span: Span = WHOLE,
    *,
    executor: CountingExecutor | None = None,
    resources: ResourceManager | None = None,
) -> WeightsIntake:
    return WeightsIntake(executor or CountingExecutor(), span, NBYTES, resources or bounded(2**20), ALICE)


def bounded(peer_bytes: int) -> ResourceManager:
    limits = ResourceLimits.of(Machine(1024, 2**30))
    return ResourceManager(attrs.evolve(limits, bytes=Bounds(2**30, peer_bytes, 2**20, 2**30)))


async def test_parts_are_bounded_before_they_are_put_together() -> None:
    part, last = AdapterPart(2.0), AdapterPart(2.0, last=True)
    tensors = adapter_tensors()
    with intake() as arriving:
        assert await arriving.take(part, tensors[:2]) is None
        whole = await arriving.take(last, tensors[2:])
        assert whole is not None and (len(whole.tensors), whole.scaling) == (6, 2.0)
        with pytest.raises(AdapterError, match=f"more than {NBYTES} bytes"):
            await arriving.take(part, tensors[:1])
    with pytest.raises(AdapterError, match="two tensors named"), intake() as arriving:
        await arriving.take(part, [tensors[0], tensors[0]])
    with pytest.raises(ProtocolError, match="no tensors"), intake() as arriving:
        await arriving.take(part, ())
    empty = [[tensor_of(f"0.{m}{n}.lora_A", [], (0, WIDTH)) for n in range(40)] for m in "ab"]
    with intake(Span(0, 1)) as crowd:
        await crowd.take(part, empty[0])
        with pytest.raises(AdapterError, match="64 tensors"):
            await crowd.take(part, empty[1])


async def test_what_arrives_is_counted_for_its_client_until_it_is_let_go() -> None:
    tensors = adapter_tensors()
    resources = bounded(NBYTES - 1)
    with intake(resources=resources) as arriving:
        await arriving.take(AdapterPart(), tensors[:-1])
        assert resources.used(Resource.BYTES, ALICE) == NBYTES - tensors[-1].decoded_nbytes
        with pytest.raises(ResourceLimitError, match="bytes"):
            await arriving.take(AdapterPart(last=True), tensors[-1:])
    assert resources.used(Resource.BYTES, ALICE) == 0


async def test_what_does_not_fit_the_blocks_is_refused_before_it_is_decoded() -> None:
    class Strict(CountingExecutor):
        def check_adapter(self, name: str, dtype: str, shape: tuple[int, ...], span: Span) -> None:
            raise AdapterError(f"{name} of {shape} is of no block of {span}")

        async def decode(self, tensor: Tensor) -> Tensor:
            raise AssertionError("it was decoded")

    with intake(executor=Strict()) as arriving, pytest.raises(AdapterError, match="of no block of 0:12"):
        await arriving.take(AdapterPart(), adapter_tensors()[:1])


async def test_nothing_of_a_refused_adapter_stays_though_its_error_does() -> None:
    where, refs = store(), list[weakref.ref[Tensor]]()

    async def ask(span: Span, arriving: WeightsIntake) -> Weights:
        tensors = [attrs.evolve(tensor) for tensor in adapter_tensors()]
        refs.extend(map(weakref.ref, tensors))
        await arriving.take(AdapterPart(), tensors)
        raise AdapterError("not after all")

    gc.disable()
    try:
        with pytest.raises(AdapterError) as caught:
            await get(where, ALICE, version(1), ask)
        assert caught.value.__context__ is None
        assert len(refs) == 6 and not any(ref() for ref in refs)
    finally:
        gc.enable()
    assert where._resources.used(Resource.BYTES) == 0
