"""A stream that changes from one pipe to another in the middle of whatever goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
from pipe_pair import PipeEnd, pipe_pair

from swarmcore.errors import ConnectionLostError, SwarmError, UnavailableError
from swarmcore.identity import Identity
from swarmcore.resources import ResourceManager
from swarmcore.transport import Stream
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.frames import FrameType, Settings, encode_frame
from swarmcore_transports.framed.migration import TOKEN_BYTES

LIMITS = Limits(max_message=2**20, send_buffer=64 * 1024)
DIALLER, LISTENER = Identity.generate().peer, Identity.generate().peer


@attrs.define
class Ends:
    """A dialler and a listener that connect over pipes of the test's making."""

    rng: random.Random
    dialler: ConnectionManager = attrs.Factory(
        lambda: ConnectionManager(LIMITS, lambda connection: False, ResourceManager)
    )
    listener: ConnectionManager = attrs.Factory(
        lambda: ConnectionManager(LIMITS, lambda connection: False, ResourceManager)
    )
    incoming: asyncio.Queue[Stream] = attrs.Factory(asyncio.Queue)

    async def connect(self, path: str, token: bytes = b"") -> tuple[Connection, PipeEnd, PipeEnd]:
        settings = Settings.of(LIMITS)
        near_pipe, far_pipe = pipe_pair(path, self.rng)
        near = Connection(self.dialler, LIMITS, lambda c, kind, body: c.establish(LISTENER, settings))

        def greet(connection: Connection, kind: FrameType, body: bytes) -> None:
            connection.token = body
            connection.establish(PeerId(DIALLER), settings)
            self.listener.connection_idle(connection)

        far = Connection(self.listener, LIMITS, greet, self.listener.accept_stream)
        for pipe, connection in ((near_pipe, near), (far_pipe, far)):
            pipe.set_protocol(connection)
            connection.connection_made(pipe)
        near.token = token or self.rng.randbytes(TOKEN_BYTES)
        near.write(encode_frame(FrameType.HELLO, near.token))
        far.write(encode_frame(FrameType.HELLO))
        await near.established
        return near, near_pipe, far_pipe

    async def open(self, path: str) -> tuple[Connection, Stream, Stream]:
        connection, _, _ = await self.connect(path)
        near = self.dialler.open_stream(connection, LISTENER)
        return connection, near, await self.incoming.get()


@asynccontextmanager
async def ends(seed: int = 0) -> AsyncIterator[Ends]:
    both = Ends(random.Random(seed))

    async def hold(stream: Stream) -> None:
        both.incoming.put_nowait(stream)
        await asyncio.Event().wait()

    both.listener.serve(hold)
    try:
        async with asyncio.timeout(20):
            yield both
    finally:
        for side in (both.dialler, both.listener):
            side.begin_close()
        for side in (both.dialler, both.listener):
            await side.finish_close()


async def send_all(stream: Stream, messages: list[bytes]) -> None:
    for message in messages:
        await stream.send(message)
        await asyncio.sleep(0)


async def receive_all(stream: Stream, count: int) -> list[bytes]:
    return [bytes(await stream.receive()) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_lost_doubled_or_out_of_turn(seed: int) -> None:
    async with ends(seed) as both:
        connection, near, far = await both.open("relayed")
        messages = [
            [both.rng.randbytes(both.rng.choice((0, 10, 3000, 90_000))) for _ in range(30)] for _ in range(2)
        ]
        talk = [
            asyncio.create_task(send_all(near, messages[0])),
            asyncio.create_task(send_all(far, messages[1])),
            asyncio.create_task(receive_all(far, 30)),
            asyncio.create_task(receive_all(near, 30)),
        ]
        for path in ("hole-punched", "direct", "relayed"):
            for _ in range(both.rng.randrange(30)):
                await asyncio.sleep(0)
            fresh, _, _ = await both.connect(path)
            await both.dialler.migrate(connection, fresh)
            assert near.path == path
            while connection.migration or any(held.migration for held in both.listener._all):
                await asyncio.sleep(0)
            assert far.path == path
        await asyncio.gather(*talk)
        assert talk[2].result() == messages[0]
        assert talk[3].result() == messages[1]


async def test_the_old_pipe_is_let_go_and_the_stream_can_end() -> None:
    async with ends() as both:
        connection, near, far = await both.open("relayed")
        old = connection.transport
        assert isinstance(old, PipeEnd)
        fresh, _, _ = await both.connect("direct")
        await both.dialler.migrate(connection, fresh)
        await near.send(b"one")
        assert bytes(await far.receive()) == b"one"
        while not (old.closing and old.other.closing):
            await asyncio.sleep(0)
        await far.send(b"two")
        assert bytes(await near.receive()) == b"two"
        await near.close()
        await far.close()
        while both.dialler.idle < 1:
            await asyncio.sleep(0)
        assert (len(both.dialler), len(both.listener)) == (1, 1)


async def test_a_listener_that_does_not_know_the_connection_leaves_it_where_it_is() -> None:
    async with ends() as both:
        connection, near, far = await both.open("relayed")
        connection.token = bytes(TOKEN_BYTES)
        fresh, _, _ = await both.connect("direct")
        with pytest.raises(SwarmError):
            await both.dialler.migrate(connection, fresh)
        assert near.path == "relayed"
        await near.send(b"still here")
        assert bytes(await far.receive()) == b"still here"


async def test_the_old_pipe_breaks_in_the_middle() -> None:
    async with ends() as both:
        connection, near, far = await both.open("relayed")
        old = connection.transport
        assert isinstance(old, PipeEnd)
        fresh, _, _ = await both.connect("direct")
        old.other.paused = True
        await both.dialler.migrate(connection, fresh)
        old.abort()
        old.other.arriving.clear()  # the last words are lost on the way
        old.other.resume_reading()
        with pytest.raises(UnavailableError):
            await near.receive()
        with pytest.raises(ConnectionLostError):
            await far.receive()


async def test_the_new_pipe_breaks_before_anyone_has_used_it() -> None:
    async with ends() as both:
        connection, near, far = await both.open("relayed")
        fresh, near_pipe, far_pipe = await both.connect("direct")
        moving = asyncio.create_task(both.dialler.migrate(connection, fresh))
        while not far_pipe.paused:
            await asyncio.sleep(0)
        near_pipe.arriving.clear()
        near_pipe.abort()
        with pytest.raises(SwarmError):
            await moving
        await near.send(b"never left")
        assert bytes(await far.receive()) == b"never left"


async def test_garbage_instead_of_a_move_breaks_one_connection_only() -> None:
    async with ends() as both:
        _, near, far = await both.open("relayed")
        fresh, _, _ = await both.connect("direct")
        fresh.write(encode_frame(FrameType.MOVE))
        while fresh.error is None:
            await asyncio.sleep(0)
        await near.send(b"untouched")
        assert bytes(await far.receive()) == b"untouched"
