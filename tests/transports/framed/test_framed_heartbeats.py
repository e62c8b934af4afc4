"""How often a side says that it lives."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest
from pipe_pair import pipe_pair

from swarmcore.errors import ConnectionLostError
from swarmcore.identity import Identity
from swarmcore.resources import ResourceManager
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connections import Connections
from swarmcore_transports.framed.frames import Kind, encode_frame
from swarmcore_transports.framed.settings import Settings

HEARTBEAT = encode_frame(Kind.HEARTBEAT)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("own", "asked", "written"), [(3.0, 0.05, 19), (3.0, 1.0, 19), (3.0, 3.0, 6), (0.5, 0.5, 39)]
)
async def test_nobody_is_made_to_speak_more_than_twice_a_second(
    own: float, asked: float, written: int
) -> None:
    """Unless by its own settings. In ten seconds:"""
    limits = Limits(keepalive=own)
    connections = Connections(limits, lambda connection: False, ResourceManager)
    connection = Connection(connections, limits, lambda connection, kind, body: None)
    near, far = pipe_pair("direct", random.Random(1))
    near.set_protocol(connection)
    far.set_protocol(asyncio.BufferedProtocol())
    far.pause_reading()
    connection.connection_made(near)
    connection.establish(Identity.generate().peer, attrs.evolve(Settings.of(limits), heartbeat=asked))
    for _ in range(100):
        await asyncio.sleep(0.1)
        connection.buffer_updated(0)  # the other side lives
    assert near.written // len(HEARTBEAT) == pytest.approx(written, abs=1)
    connection.fail(ConnectionLostError("the test is over"))
