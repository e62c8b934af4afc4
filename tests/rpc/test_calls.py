"""Unary calls: what arrives, what fails and how, and that nothing outlives its caller."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
from small_resources import bounded

from swarmcore.errors import (
    AddressError,
    CacheFullError,
    ConnectionLostError,
    DeadlineExceededError,
    InputError,
    MessageTooLargeError,
    MissingBlocksError,
    PeerIdentityError,
    PeerNotAllowedError,
    PeerUnreachableError,
    ProtocolError,
    RemoteFaultError,
    StreamClosedError,
    SwarmError,
    TooManyCallsError,
    UnknownTransportError,
)
from swarmcore.identity import Identity
from swarmcore.resources import Bounds, Resource, ResourceManager
from swarmcore.rpc import Caller, Method, Node, serving
from swarmcore.rpc.dialing import STAGGER
from swarmcore.testing import MemoryNetwork
from swarmcore.transport import Stream
from swarmcore.wire.failure import Failure
from swarmcore.wire.framing import decode_message, encode_message, kinds_of
from swarmcore.wire.messages import PING, Ping, Pong, StepOutput
from swarmcore_transports.tcp import TcpTransport

from .conftest import LIMITS, Nodes

ping = Method(PING, Ping, Pong)
ANSWERS = kinds_of(Pong, Failure)
Handler = Callable[[Ping, Caller], Awaitable[Pong]]


async def pong(request: Ping, _caller: Caller) -> Pong:
    return Pong(request.payload)


class Hanging:
    """A handler that hangs until it is cancelled, and tells when it starts and ends."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, _request: Ping, _caller: Caller) -> Pong:
        self.started.set()
        try:
            return await asyncio.Future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def pair(nodes: Nodes, handler: Handler = pong) -> tuple[Node, Node]:
    """A client and a server that answers pings with ``handler``."""
    server = await nodes.start()
    server.serve(ping, handler)
    return await nodes.start(listen=False), server


async def test_a_call_returns_the_reply_and_the_handler_knows_the_caller(nodes: Nodes) -> None:
    callers = []

    async def handler(request: Ping, caller: Caller) -> Pong:
        callers.append(caller)
        return Pong(request.payload[::-1])

    client, server = await pair(nodes, handler)
    now = asyncio.get_running_loop().time()
    assert await client.call(server.addresses, ping, Ping(b"abc"), timeout=7.0) == Pong(b"cba")
    (caller,) = callers
    assert caller.peer == client.peer
    assert caller.path == "direct"
    assert now < caller.deadline <= now + 7.0 + 1.0
    assert server.counters["calls_in"] == client.counters["calls_out"] == 1


async def test_a_hundred_calls_at_once(nodes: Nodes) -> None:
    everyone = asyncio.Barrier(100)

    async def handler(request: Ping, _caller: Caller) -> Pong:
        await everyone.wait()
        return Pong(request.payload)

    client, server = await pair(nodes, handler)
    assert repr(client) == f"<Node {client.peer[:4]}…{client.peer[-6:]} {nodes.kind} 0 calls in 0 out>"
    calls = [client.call(server.addresses, ping, Ping(b"%d" % n)) for n in range(100)]
    replies = await asyncio.gather(*calls)
    assert [reply.payload for reply in replies] == [b"%d" % n for n in range(100)]
    assert repr(client).endswith("0 out>")


@pytest.mark.parametrize(
    "error",
    [
        CacheFullError("no room; retry", retry_after=2.5),
        MissingBlocksError("start a server", ranges=["0:3", "7:9"]),
        ConnectionLostError("lost another peer"),
        StreamClosedError("another stream"),
    ],
)
async def test_an_error_arrives_as_its_own_class(nodes: Nodes, error: SwarmError) -> None:
    async def handler(_request: Ping, _caller: Caller) -> Pong:
        raise error

    client, server = await pair(nodes, handler)
    with pytest.raises(type(error)) as raised:
        await client.call(server.addresses, ping, Ping())
    assert type(raised.value) is type(error)
    assert raised.value.message == error.message
    assert raised.value.details == error.details
    assert raised.value.origin == server.peer


@pytest.mark.parametrize(
    "bug", [ValueError("secret"), TimeoutError("secret"), asyncio.CancelledError("secret")]
)
async def test_a_bug_is_logged_there_and_anonymous_here(
    nodes: Nodes, bug: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_request: Ping, _caller: Caller) -> Pong:
        raise bug

    client, server = await pair(nodes, handler)
    with pytest.raises(RemoteFaultError) as raised:
        await client.call(server.addresses, ping, Ping())
    assert "secret" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert "secret" in caplog.text


async def test_a_reply_that_cannot_be_sent(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Ping, _caller: Caller) -> Any:
        return Pong(bytes(LIMITS.max_message)) if request.payload else Ping()

    client, server = await pair(nodes, handler)
    with pytest.raises(MessageTooLargeError):
        await client.call(server.addresses, ping, Ping(b"large"))
    with pytest.raises(RemoteFaultError):
        await client.call(server.addresses, ping, Ping())
    assert "returned Ping" in caplog.text


async def test_unknown_methods_name_the_versions_spoken(nodes: Nodes) -> None:
    client, server = await pair(nodes)
    with pytest.raises(
        ProtocolError, match=r"does not serve '/swarmcore/ping/2'; it serves /swarmcore/ping/1"
    ):
        await client.call(server.addresses, Method("/swarmcore/ping/2", Ping, Pong), Ping())
    with pytest.raises(ProtocolError, match="it serves /swarmcore/ping/1"):
        await client.call(server.addresses, Method("/other/1", Ping, Pong), Ping())


async def test_the_deadline_ends_the_call_on_both_sides(nodes: Nodes) -> None:
    hanging = Hanging()
    client, server = await pair(nodes, hanging)
    with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
        await client.call(server.addresses, ping, Ping(), timeout=0.2)
    await hanging.cancelled.wait()


async def test_the_deadline_travels(nodes: Nodes) -> None:
    """A caller that does not hang up itself is told when its time is over."""
    _client, server = await pair(nodes, Hanging())
    stream = await open_stream(nodes, server)
    await stream.send(*encode_message(Ping(), (), LIMITS, method=PING, timeout=0.05))
    failure = decode_message(await stream.receive(), kinds_of(Failure), LIMITS).record
    assert failure.error == "DeadlineExceededError"
    with pytest.raises(StreamClosedError):
        await stream.receive()
    await stream.close()


async def test_cancelling_a_call_cancels_the_handler(nodes: Nodes) -> None:
    hanging = Hanging()
    client, server = await pair(nodes, hanging)
    call = asyncio.create_task(client.call(server.addresses, ping, Ping()))
    await hanging.started.wait()
    assert "1 calls in 0 out" in repr(server)
    assert "0 calls in 1 out" in repr(client)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    await hanging.cancelled.wait()


async def test_closing_a_node_cancels_its_handlers_and_calls(nodes: Nodes) -> None:
    hanging = Hanging()
    client, server = await pair(nodes, hanging)
    call = asyncio.create_task(client.call(server.addresses, ping, Ping()))
    await hanging.started.wait()
    await server.close()
    assert hanging.cancelled.is_set()
    with pytest.raises(SwarmError):
        await call
    await server.close()
    with pytest.raises(PeerUnreachableError):
        await client.call(server.addresses, ping, Ping(), timeout=5)
    await client.close()
    with pytest.raises(StreamClosedError, match="node is closed"):
        await client.call(server.addresses, ping, Ping())


async def test_a_handler_may_close_its_own_node(nodes: Nodes) -> None:
    async def handler(_request: Ping, _caller: Caller) -> Pong:
        await server.close()
        return Pong()

    client, server = await pair(nodes, handler)
    with pytest.raises(SwarmError):
        await client.call(server.addresses, ping, Ping())


async def open_stream(nodes: Nodes, server: Node) -> Stream:
    """A bare stream to ``server``, for what no node would send."""
    node = await nodes.start(listen=False)
    (transport,) = node._transports.values()
    return await transport.open_stream(server.addresses[0])


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\xff" * 1000,
        b"".join(encode_message(Ping(), (), LIMITS)),
        b"".join(encode_message(Ping(), (), LIMITS, method=PING)),
        b"".join(encode_message(Ping(), (), LIMITS, method=PING, timeout=0.0)),
        b"".join(encode_message(Ping(), (), LIMITS, method=PING, timeout=-1.0)),
        b"".join(encode_message(Ping(), (), LIMITS, method=PING, timeout=math.nan)),
        b"".join(encode_message(Pong(), (), LIMITS, method=PING, timeout=1.0)),
    ],
)
async def test_a_garbage_opening_is_refused(nodes: Nodes, opening: bytes) -> None:
    client, server = await pair(nodes)
    stream = await open_stream(nodes, server)
    await stream.send(opening)
    failure = decode_message(await stream.receive(), kinds_of(Failure), LIMITS).record
    assert failure.error == "ProtocolError"
    await stream.close()
    assert await client.call(server.addresses, ping, Ping(b"still there")) == Pong(b"still there")


async def test_a_silent_opener_is_refused(nodes: Nodes) -> None:
    server = await nodes.start(limits=attrs.evolve(LIMITS, connect_timeout=0.1))
    stream = await open_stream(nodes, server)
    failure = decode_message(await stream.receive(), kinds_of(Failure), LIMITS).record
    assert failure.error == "ProtocolError"
    await stream.close()


async def test_an_endless_timeout_is_bounded(nodes: Nodes) -> None:
    client, server = await pair(nodes)
    assert await client.call(server.addresses, ping, Ping(), timeout=math.inf) == Pong()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"garbage", ProtocolError),
        (b"".join(encode_message(StepOutput(1, 2), (), LIMITS)), ProtocolError),
        (None, ConnectionLostError),
    ],
)
async def test_a_bad_answer_is_an_error(nodes: Nodes, answer: bytes | None, error: type[SwarmError]) -> None:
    async def answer_badly(stream: Stream) -> None:
        await stream.receive()
        if answer is not None:
            await stream.send(answer)

    identity = Identity.generate()
    transport = nodes.transport(identity)
    addresses = await transport.listen(answer_badly)
    client = await nodes.start(listen=False)
    with pytest.raises(error):
        await client.call(addresses, ping, Ping())
    await transport.close()


@pytest.mark.parametrize("limit", ["max_calls", "max_calls_per_peer"])
async def test_calls_above_the_limit_are_refused_until_one_ends(nodes: Nodes, limit: str) -> None:
    server = await nodes.start(limits=attrs.evolve(LIMITS, **{limit: 2}))
    client = await nodes.start(listen=False)
    other = await nodes.start(listen=False)
    busy, release = asyncio.Semaphore(0), asyncio.Event()

    async def handler(request: Ping, _caller: Caller) -> Pong:
        busy.release()
        await release.wait()
        return Pong()

    server.serve(ping, handler)
    calls = [asyncio.create_task(client.call(server.addresses, ping, Ping())) for _ in range(2)]
    for _ in calls:
        await busy.acquire()
    with pytest.raises(TooManyCallsError):
        await client.call(server.addresses, ping, Ping())
    assert server.counters["refused"] == 1
    another = asyncio.create_task(other.call(server.addresses, ping, Ping()))
    if limit == "max_calls_per_peer":
        await busy.acquire()
        release.set()
        await another
    else:
        with pytest.raises(TooManyCallsError):
            await another
        release.set()
    await asyncio.gather(*calls)
    await other.call(server.addresses, ping, Ping())


async def test_a_closed_swarm(nodes: Nodes) -> None:
    friend = await nodes.start(listen=False)
    stranger = await nodes.start()
    stranger.serve(ping, pong)
    server = await nodes.start(allowed_peers={friend.peer})
    server.serve(ping, pong)
    assert await friend.call(server.addresses, ping, Ping()) == Pong()
    with pytest.raises(PeerNotAllowedError, match=stranger.peer):
        await stranger.call(server.addresses, ping, Ping())
    with pytest.raises(PeerNotAllowedError):
        await server.call(stranger.addresses, ping, Ping())


async def test_the_wrong_peer_at_an_address(nodes: Nodes) -> None:
    client, server = await pair(nodes)
    wrong = attrs.evolve(server.addresses[0], peer=Identity.generate().peer)
    with pytest.raises(PeerIdentityError):
        await client.call(wrong, ping, Ping())


async def test_several_addresses_are_tried_in_turn(nodes: Nodes) -> None:
    client, server = await pair(nodes)
    (good,) = server.addresses
    unknown = attrs.evolve(good, scheme="pigeon")
    dead = attrs.evolve(good, location="//127.0.0.1:1" if nodes.kind == "tcp" else "//nowhere")
    with pytest.raises(PeerUnreachableError, match="none of its addresses"):
        await client.call([dead, dead], ping, Ping())
    assert await client.call([unknown, dead, good], ping, Ping(b"x")) == Pong(b"x")
    with pytest.raises(
        UnknownTransportError, match=f"reached by pigeon, but this node has only {nodes.kind}"
    ):
        await client.call(unknown, ping, Ping())
    with pytest.raises(AddressError):
        await client.call([], ping, Ping())
    with pytest.raises(AddressError):
        await client.call([good, attrs.evolve(good, peer=client.peer)], ping, Ping())


@pytest.mark.virtual_time
async def test_a_silent_address_costs_only_its_head_start() -> None:
    network = MemoryNetwork()
    silent_identity, server_identity = Identity.generate(), Identity.generate()
    silent = network.transport(silent_identity, listen=False)
    silent.scheme = "silent"  # type: ignore[misc]

    async def never(_address: Any) -> Stream:
        return await asyncio.Future()

    silent.open_stream = never  # type: ignore[method-assign]
    async with (
        Node(server_identity, [network.transport(server_identity)]) as server,
        Node(silent_identity, [silent, network.transport(silent_identity, listen=False)]) as client,
    ):
        server.serve(ping, pong)
        (good,) = server.addresses
        bad = attrs.evolve(good, scheme="silent")
        assert await client.call([good, bad], ping, Ping(b"x"), timeout=10) == Pong(b"x")
        assert asyncio.get_running_loop().time() == pytest.approx(STAGGER)
        with pytest.raises(DeadlineExceededError):
            await client.call(bad, ping, Ping(), timeout=10)
        assert asyncio.get_running_loop().time() == pytest.approx(STAGGER + 10.0)


async def test_what_cannot_be_served(nodes: Nodes) -> None:
    _, server = await pair(nodes)
    with pytest.raises(InputError, match="has a handler already"):
        server.serve(ping, pong)
    for name in "ping", "/ping", "/ping/", "/ping/0", "/Ping/1", "/ping/1/x", "/" + "p" * 200 + "/1":
        with pytest.raises(InputError, match="name a method"):
            Method(name, Ping, Pong)


@asynccontextmanager
async def slow_reader(room: ResourceManager | None = None) -> AsyncIterator[tuple[Node, list[Stream]]]:
    """A server, and three calls to it whose caller has room for the answer to one of them at a time."""
    identities = [Identity.generate(), Identity.generate()]
    limits = attrs.evolve(LIMITS, send_buffer=2**14)
    served = TcpTransport(identities[0], limits=LIMITS, listen_on=["127.0.0.1:0"])
    caller = TcpTransport(identities[1], limits=limits)
    caller.resources = bounded(bytes=Bounds(10**6, 200_000, 10**6, 10**6))
    try:
        async with Node(identities[0], [served], limits=LIMITS, resources=room) as server:
            server.serve(ping, lengthy)
            streams = [await caller.open_stream(server.addresses[0]) for _ in range(3)]
            for stream in streams:
                await stream.send(*encode_message(Ping(), (), LIMITS, method=PING, timeout=80_000.0))
            yield server, streams
    finally:
        await caller.close()


async def lengthy(_request: Ping, _caller: Caller) -> Pong:
    return Pong(bytes(100_000))


async def test_an_answer_that_nobody_reads_is_counted_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the deadline that the caller has set."""
    monkeypatch.setattr(serving, "UNREAD_TIMEOUT", 0.5)
    async with slow_reader() as (server, _), asyncio.timeout(10):
        while server.resources.used(Resource.BYTES) < 200_000:
            await asyncio.sleep(0.01)
        while server.resources.used(Resource.STREAMS):
            await asyncio.sleep(0.01)
        assert server.resources.used(Resource.BYTES) < 200_000


async def test_more_unread_answers_than_there_is_room_for_are_refused() -> None:
    room = bounded(bytes=Bounds(10**6, 400_000, 10**6, 10**6))
    async with slow_reader(room) as (_, streams), asyncio.timeout(10):
        answers = [decode_message(await stream.receive(), ANSWERS, LIMITS).record for stream in streams]
        refused = [answer.error for answer in answers if isinstance(answer, Failure)]
        assert "ResourceLimitError" in refused
