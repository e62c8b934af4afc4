"""Two ends of a byte pipe in memory, each with the face of an asyncio transport."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any


class PipeEnd(asyncio.Transport):
    """What is written arrives at ``other`` in pieces of any size, some turns of the event loop later."""

    def __init__(self, path: str, rng: random.Random) -> None:
        super().__init__()
        self.path = path
        self.rng = rng
        self.other: PipeEnd
        self.protocol: Any = None
        self.arriving: deque[bytes] = deque()
        self.paused = False
        self.closing = False
        self.written = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.path if name == "path" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Any) -> None:
        data = b"".join(list_of_data)
        if self.closing:
            return
        self.written += len(data)
        while data:
            size = self.rng.choice((1, 5, 9, 700, 70_000))
            self.other.arriving.append(data[:size])
            data = data[size:]
        self.later(self.other.deliver)

    def deliver(self) -> None:
        while self.arriving and not self.paused and not self.closing:
            data = memoryview(self.arriving.popleft())
            while data:
                if self.paused:
                    self.arriving.appendleft(bytes(data))
                    return
                buffer = self.protocol.get_buffer(len(data))
                taken = min(len(buffer), len(data))
                buffer[:taken] = data[:taken]
                self.protocol.buffer_updated(taken)
                data = data[taken:]
        if self.other.closing and not self.closing and not self.arriving:
            self.abort()

    def later(self, function: Any, *arguments: Any) -> None:
        loop = asyncio.get_running_loop()
        turns = self.rng.randrange(4)

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                function(*arguments)

        loop.call_soon(turn, turns)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        self.deliver()

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closing:
            self.closing = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self.protocol.connection_lost, None)
            self.later(self.other.deliver)


def pipe_pair(path: str, rng: random.Random) -> tuple[PipeEnd, PipeEnd]:
    """The dialler's and the listener's end of a new pipe."""
    near, far = PipeEnd(path, rng), PipeEnd(path, rng)
    near.other, far.other = far, near
    return near, far
