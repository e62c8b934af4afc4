"""Reading a stream ahead of its user, so that a peer that vanishes is noticed while a handler computes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from swarmcore.errors import StreamClosedError, SwarmError
from swarmcore.transport import Stream

MAX_AHEAD = 8
"""Messages that wait for the handler before the stream is left to push back on the sender."""
MAX_AHEAD_BYTES = 2**20
"""The same in bytes; a single message may be larger."""


class ReadAhead:
    """Receives a stream's messages into a bounded queue, in one task for the whole life of the stream.

    ``on_lost`` is called once when the stream breaks or is aborted, and is expected to cancel whoever waits
    in `receive`: a handler that got an error *and* a cancellation would have its clean-up cut short. An
    orderly end is no loss, the remote may still wait for answers. A loss is seen at once unless as many
    messages as are read ahead wait for the handler.
    """

    def __init__(self, stream: Stream, on_lost: Callable[[SwarmError], None]) -> None:
        self._stream = stream
        self._on_lost: Callable[[SwarmError], None] | None = on_lost
        self._messages: deque[memoryview] = deque()
        self._nbytes = 0
        self._end: SwarmError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._run(), name="read ahead")

    async def receive(self) -> memoryview:
        """As `Stream.receive`."""
        while not self._messages:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message = self._messages.popleft()
        self._nbytes -= message.nbytes
        self._room.set()
        return message

    def disarm(self) -> None:
        """From now on this side is ending the stream itself: its end is no loss."""
        self._on_lost = None

    async def stop(self) -> None:
        """Stop reading; what was read and not received is dropped."""
        if (task := self._task) is not None:
            self._task = None  # its error holds its frame, which holds this object: a cycle for every call
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        try:
            while True:
                message = await self._stream.receive()
                self._messages.append(message)
                self._nbytes += message.nbytes
                self._wake()
                while len(self._messages) >= MAX_AHEAD or self._nbytes >= MAX_AHEAD_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except SwarmError as error:
            self._end = error
            if self._on_lost is None or isinstance(error, StreamClosedError):
                self._wake()
            else:
                self._on_lost(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
