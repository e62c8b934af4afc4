"""A libp2p stream with the face of an asyncio transport, without a thread below it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
from libp2p.abc import INetStream

from swarmcore_transports.libp2p.pipe import StreamPipe
from swarmcore_transports.libp2p.trio_thread import TrioThread


class Growing(asyncio.BufferedProtocol):
    """Grows its buffer by ten bytes whenever it is asked for one, as a message that arrives in parts does."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.received = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        self.buffer.extend(bytes(10))
        return memoryview(self.buffer)[self.received :]

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes


async def test_bytes_for_a_buffer_that_grows_meanwhile() -> None:
    stream = cast(INetStream, SimpleNamespace(muxed_stream=None))
    pipe = StreamPipe(cast(TrioThread, None), stream, "direct", trio.Event(), silence=1.0)
    pipe._protocol = protocol = Growing()
    pipe._received_bytes(bytes(range(100)))
    pipe._received_bytes(bytes(range(100, 200)))
    assert protocol.buffer[: protocol.received] == bytes(range(200))
