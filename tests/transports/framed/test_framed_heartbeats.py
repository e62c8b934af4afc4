"""How often a side says that it lives."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest
from pipe_pair import PipeEnd, pipe_pair

from swarmcore.errors import ConnectionLostError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.resources import ResourceManager
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.flow_control import MESSAGE_COST
from swarmcore_transports.framed.frames import FrameType, Settings, encode_frame
from swarmcore_transports.framed.stream import FramedStream

HEARTBEAT = encode_frame(FrameType.HEARTBEAT)


def connected(limits: Limits, asked: float) -> tuple[Connection, PipeEnd]:
    """A connection whose other side asks for a sign of life as often, and its end of the pipe."""
    connections = ConnectionManager(limits, lambda connection: False, ResourceManager)
    connection = Connection(connections, limits, lambda connection, kind, body: None)
    near, far = pipe_pair("direct", random.Random(1))
    near.set_protocol(connection)
    far.set_protocol(asyncio.BufferedProtocol())
    far.pause_reading()
    connection.connection_made(near)
    connection.establish(Identity.generate().peer, attrs.evolve(Settings.of(limits), heartbeat=asked))
    return connection, near


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("own", "asked", "written"), [(3.0, 0.05, 19), (3.0, 1.0, 19), (3.0, 3.0, 6), (0.5, 0.5, 39)]
)
async def test_nobody_is_made_to_speak_more_than_twice_a_second(
    own: float, asked: float, written: int
) -> None:
    """Unless by its own settings. In ten seconds:"""
    connection, near = connected(Limits(keepalive=own), asked)
    for _ in range(100):
        await asyncio.sleep(0.1)
        connection.buffer_updated(0)  # the other side lives
    assert near.written // len(HEARTBEAT) == pytest.approx(written, abs=1)
    connection.fail(ConnectionLostError("the test is over"))


@pytest.mark.virtual_time
async def test_a_flood_of_signs_of_life_ends_the_connection() -> None:
    connection, _ = connected(Limits(keepalive=3.0), 3.0)
    for _ in range(20):
        for _ in range(20):
            connection.frame_received(FrameType.HEARTBEAT, 0, b"")
        await asyncio.sleep(1.5)
        connection.buffer_updated(0)
    assert connection.error is None
    with pytest.raises(ProtocolError, match="floods"):
        for _ in range(1000):
            connection.frame_received(FrameType.HEARTBEAT, 0, b"")
    connection.fail(ConnectionLostError("the test is over"))


async def test_a_flood_of_credit_ends_the_connection() -> None:
    """Who grants again the cost of each message is no flood."""
    limits = Limits()
    connection, _ = connected(limits, 3.0)
    stream = FramedStream(connection, Identity.generate().peer, limits, ResourceManager())
    for _ in range(200):
        await stream.send(b"")
        connection.frame_received(FrameType.CREDIT, MESSAGE_COST, b"")
    with pytest.raises(ProtocolError, match="floods"):
        for _ in range(1000):
            connection.frame_received(FrameType.CREDIT, 1, b"")
    connection.fail(ConnectionLostError("the test is over"))
