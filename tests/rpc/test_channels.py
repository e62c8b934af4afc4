"""Two-way channels: order, back-pressure, ends of all kinds, and no work per message but one encode."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from small_resources import bounded

from swarmcore.errors import (
    InputError,
    InvalidStepError,
    ProtocolError,
    RemoteFaultError,
    ResourceLimitError,
    SessionLostError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.resources import Bounds, Resource
from swarmcore.rpc import Channel, Node, Protocol
from swarmcore.rpc.channel import MAX_AHEAD
from swarmcore.wire.framing import encode_message
from swarmcore.wire.messages import INFERENCE, JoinSession, OpenSession, Ping, SessionOpened, Step, StepOutput
from swarmcore.wire.tensors import Tensor

from .conftest import LIMITS, Nodes

protocol = Protocol(INFERENCE, (OpenSession, JoinSession), (Step,), (SessionOpened, StepOutput))
OPENING = OpenSession("s" * 32, "f" * 64, 0, 10, 1)
Handler = Callable[[Channel], Awaitable[None]]


def step(number: int) -> Step:
    return Step(number, (number,), (1,))


def hidden(number: int, nbytes: int = 4096) -> Tensor:
    return Tensor("hidden", "uint8", (nbytes,), memoryview(bytes([number % 256]) * nbytes))


async def echo(channel: Channel) -> None:
    while True:
        message = await channel.receive()
        await channel.send(StepOutput(message.record.step, 10), *message.tensors)


class Watched:
    """A handler that busies itself with something else than the channel until it is cancelled."""

    def __init__(self) -> None:
        self.channels: asyncio.Queue[Channel] = asyncio.Queue()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, channel: Channel) -> None:
        self.channels.put_nowait(channel)
        try:
            await self.release.wait()
        finally:
            await asyncio.sleep(0.01)
            self.ended.set()


async def connect(nodes: Nodes, handler: Handler) -> tuple[Channel, Node]:
    """A channel to a server on which ``handler`` waits at the other end."""
    server = await nodes.start()
    server.serve_protocol(protocol, handler)
    client = await nodes.start(listen=False)
    return await client.open(server.addresses, protocol, OPENING), server


async def test_messages_and_tensors_both_ways_in_order(nodes: Nodes) -> None:
    channel, server = await connect(nodes, echo)
    assert channel.remote == server.peer
    assert channel.path == "direct"
    assert channel.opening.record == OPENING
    assert repr(channel) == f"<Channel OpenSession {server.peer[:4]}…{server.peer[-6:]} direct>"
    async with channel:
        for number in range(200):
            await channel.send(step(number), hidden(number))
            message = await channel.receive()
            assert message.record == StepOutput(number, 10)
            assert message.tensor("hidden").data == hidden(number).data


async def test_the_opening_reaches_the_handler_with_its_tensors(nodes: Nodes) -> None:
    watched = Watched()
    server = await nodes.start()
    server.serve_protocol(protocol, watched)
    client = await nodes.start(listen=False)
    async with await client.open(server.addresses, protocol, OPENING, hidden(7)):
        accepted = await watched.channels.get()
        assert accepted.remote == client.peer
        assert accepted.opening.record == OPENING
        assert bytes(accepted.opening.tensor("hidden").data[:2]) == b"\7\7"
        assert "1 calls in" in repr(server)
        assert "1 out" in repr(client)
    assert "0 out" in repr(client)
    watched.release.set()
    with pytest.raises(InputError, match="does not open"):
        await client.open(server.addresses, protocol, Ping())


async def test_no_task_is_created_and_one_message_sent_per_message(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    created = []

    def count(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        created.append(coro)
        return asyncio.Task(coro, loop=loop, **options)

    channel, _ = await connect(nodes, echo)
    sent = []
    send = type(channel._stream).send

    async def counted_send(stream: Any, *buffers: Any) -> None:
        sent.append(buffers)
        await send(stream, *buffers)

    monkeypatch.setattr(type(channel._stream), "send", counted_send)
    async with channel:
        await channel.send(step(0))
        await channel.receive()
        loop.set_task_factory(count)
        sent.clear()
        for number in range(50):
            await channel.send(step(number), hidden(number))
            await channel.receive()
        loop.set_task_factory(None)
    assert not created
    assert len(sent) == 100


async def test_both_ends_may_end_in_good_order(nodes: Nodes) -> None:
    async def answer_at_the_end(channel: Channel) -> None:
        numbers = []
        try:
            while True:
                numbers.append((await channel.receive()).record.step)
        except StreamClosedError:
            await channel.send(StepOutput(sum(numbers), 10))

    channel, _ = await connect(nodes, answer_at_the_end)
    async with channel:
        for number in range(4):
            await channel.send(step(number))
        await channel.end()
        assert (await channel.receive()).record.step == 6
        with pytest.raises(StreamClosedError):
            await channel.receive()
        with pytest.raises(StreamClosedError):
            await channel.send(step(4))


async def test_the_handlers_error_arrives_after_what_it_sent(nodes: Nodes) -> None:
    async def refuse(channel: Channel) -> None:
        await channel.send(SessionOpened(100))
        raise InvalidStepError("wrong shape", expected=[1, 2])

    channel, server = await connect(nodes, refuse)
    async with channel:
        assert (await channel.receive()).record == SessionOpened(100)
        with pytest.raises(InvalidStepError, match="wrong shape") as raised:
            await channel.receive()
    assert raised.value.details == {"expected": [1, 2]}
    assert raised.value.origin == server.peer


async def test_a_refused_opening_is_told_by_receive(nodes: Nodes) -> None:
    server = await nodes.start()
    client = await nodes.start(listen=False)
    async with await client.open(server.addresses, protocol, OPENING) as channel:
        with pytest.raises(ProtocolError, match="does not serve"):
            await channel.receive()


async def test_a_bug_in_the_handler(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(channel: Channel) -> None:
        raise ValueError("secret")

    channel, _ = await connect(nodes, fail)
    async with channel:
        with pytest.raises(RemoteFaultError) as raised:
            await channel.receive()
    assert "secret" not in str(raised.value)
    assert "secret" in caplog.text


@pytest.mark.parametrize("handler", ["reading", "busy"])
@pytest.mark.parametrize("how", ["abort", "cancel", "close node"])
async def test_a_vanished_opener_cancels_the_handler(nodes: Nodes, handler: str, how: str) -> None:
    watched = Watched()

    async def reading(channel: Channel) -> None:
        watched.channels.put_nowait(channel)
        try:
            await channel.receive()
        finally:
            await asyncio.sleep(0.01)  # a clean-up that waits is not cut short
            watched.ended.set()

    server = await nodes.start()
    server.serve_protocol(protocol, watched if handler == "busy" else reading)
    client = await nodes.start(listen=False)

    connected = asyncio.Event()

    async def converse() -> None:
        async with await client.open(server.addresses, protocol, OPENING) as channel:
            await watched.channels.get()
            connected.set()
            if how == "abort":
                channel.abort("enough")
            elif how == "close node":
                await client.close()
            await asyncio.Future()

    task = asyncio.create_task(converse())
    if how == "cancel":
        await connected.wait()
        task.cancel()
    await watched.ended.wait()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("first", ["abort", "close node"])
async def test_a_handler_that_cleans_up_is_not_cancelled_again(nodes: Nodes, first: str) -> None:
    """A peer vanishes while this one closes, or the other way round."""
    began, cleaning, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(channel: Channel) -> None:
        began.set()
        try:
            await channel.receive()
        finally:
            cleaning.set()
            await asyncio.sleep(0.02)
            ended.set()

    channel, server = await connect(nodes, handler)
    await began.wait()
    if first == "abort":
        channel.abort("enough")
        await cleaning.wait()
        await server.close()
    else:
        closing = asyncio.create_task(server.close())
        await cleaning.wait()
        channel.abort("enough")
        await closing
    assert ended.is_set()


async def test_a_half_close_does_not_cancel_the_handler(nodes: Nodes) -> None:
    watched = Watched()
    channel, _ = await connect(nodes, watched)
    await channel.end()
    accepted = await watched.channels.get()
    with pytest.raises(StreamClosedError):
        await accepted.receive()
    assert not watched.ended.is_set()
    await accepted.send(SessionOpened(1))
    assert (await channel.receive()).record == SessionOpened(1)
    watched.release.set()
    with pytest.raises(StreamClosedError):
        await channel.receive()
    await channel.close()


async def test_a_handler_may_close_or_abort_its_channel(nodes: Nodes) -> None:
    async def end(channel: Channel) -> None:
        if (await channel.receive()).record.step:
            channel.abort("no more of this")
        else:
            await channel.close()
        await asyncio.sleep(0)
        finished.set()

    for number, error in (0, StreamClosedError), (1, StreamAbortedError):
        finished = asyncio.Event()
        channel, _ = await connect(nodes, end)
        await channel.send(step(number))
        with pytest.raises(error):
            await channel.receive()
        await finished.wait()
        await channel.close()


async def test_a_slow_handler_pushes_back_and_loses_nothing(nodes: Nodes) -> None:
    watched = Watched()
    channel, _ = await connect(nodes, watched)
    accepted = await watched.channels.get()
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 1000:
            # A send that has to wait has nothing under way yet, or the stream is aborted: stop at the first.
            sending = asyncio.ensure_future(channel.send(step(sent), hidden(sent, 32_768)))
            done, _pending = await asyncio.wait([sending], timeout=0.3)
            if not done:
                raise TimeoutError
            sent += 1
    assert MAX_AHEAD <= sent < 100 + MAX_AHEAD
    for number in range(sent + 1):
        assert (await accepted.receive()).record.step == number
    await sending
    watched.release.set()
    await channel.close()


async def test_records_have_their_place(nodes: Nodes) -> None:
    channel, _ = await connect(nodes, echo)
    async with channel:
        with pytest.raises(InputError, match="does not send StepOutput"):
            await channel.send(StepOutput(1, 2))
        await channel._stream.send(*encode_message(SessionOpened(1), (), LIMITS))
        with pytest.raises(ProtocolError, match="'SessionOpened' has no place here") as raised:
            await channel.receive()
        assert raised.value.origin == channel.remote


async def test_either_side_can_fail_the_channel(nodes: Nodes) -> None:
    seen: asyncio.Queue[SwarmError] = asyncio.Queue()

    async def handler(channel: Channel) -> None:
        try:
            await channel.receive()
        except SwarmError as exc:
            seen.put_nowait(exc)
            await channel.fail(SessionLostError("and mine"))

    channel, _ = await connect(nodes, handler)
    async with channel:
        await channel.fail(InvalidStepError("my mistake"))
        error = await seen.get()
        assert isinstance(error, InvalidStepError)
        assert error.message == "my mistake"
        with pytest.raises(SessionLostError, match="and mine"):
            await channel.receive()


async def test_an_end_that_the_handler_lets_pass_is_no_failure(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    channel, _ = await connect(nodes, echo)
    await channel.send(step(1))
    await channel.receive()
    await channel.end()
    with pytest.raises(StreamClosedError):
        await channel.receive()
    await channel.close()
    assert not caplog.records


async def test_a_block_that_raises_aborts_the_channel(nodes: Nodes) -> None:
    watched = Watched()
    channel, _ = await connect(nodes, watched)
    accepted = await watched.channels.get()
    with pytest.raises(KeyError):
        async with channel:
            raise KeyError
    await watched.ended.wait()
    with pytest.raises(StreamAbortedError, match="gave up: KeyError"):
        await accepted.receive()


async def test_opening_messages_are_held_within_the_share_of_their_peer(nodes: Nodes) -> None:
    server, client = await nodes.start(), await nodes.start(listen=False)
    server.resources = server.served._resources = bounded(bytes=Bounds(2**20, 300_000, 1, 2**20))
    running = asyncio.Semaphore(0)

    async def hold(channel: Channel) -> None:
        running.release()
        await channel.receive()

    server.serve_protocol(protocol, hold)
    channels = []
    for _ in range(2):
        channels.append(await client.open(server.addresses, protocol, OPENING, hidden(1, 8000)))
        await running.acquire()
    refused = await client.open(server.addresses, protocol, OPENING, hidden(1, 8000))
    with pytest.raises(ResourceLimitError, match="bytes"):
        await refused.receive()
    for channel in channels:
        channel.abort("enough")
    while server.resources.used(Resource.BYTES):
        await asyncio.sleep(0)
