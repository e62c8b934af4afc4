"""Moving a connection, and the stream it carries, from one pipe to another while both sides go on talking.

The dialler opens the new pipe and asks there to ``RESUME`` the connection; the listener agrees with a
``RESUME`` of its own. Then the dialler ends what it says on the old pipe with ``MOVE`` and goes on on the new
one; when the listener has read that, it does the same. Each side reads the old pipe to its ``MOVE`` before it
reads the new one, so that no frame is lost, doubled or out of turn, whatever was under way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from swarmcore.errors import ConnectionLostError, ProtocolError
from swarmcore_transports.framed.frames import Kind, encode_frame

if TYPE_CHECKING:
    from swarmcore_transports.framed.connection import Connection

TOKEN_BYTES = 16
"""Length of the random name by which the two ends of a connection know it."""


class Move:
    """One side of one move. ``pipe`` is silent so far and read no further until the old pipe has ended."""

    def __init__(self, connection: Connection, pipe: asyncio.Transport) -> None:
        assert connection.transport
        self._connection = connection
        self._old = connection.transport
        self._new = pipe
        self._left = False  # this side has said MOVE
        pipe.pause_reading()
        pipe.set_protocol(_NewPipe(self))

    def leave(self) -> None:
        """Say the last words on the old pipe; what is written from now on goes over the new one."""
        connection = self._connection
        connection.write(encode_frame(Kind.MOVE))
        self._left = True
        self._old.set_protocol(_OldPipe(self))
        connection.switch_to(self._new)

    def old_pipe_ended(self) -> None:
        """The other side's ``MOVE`` has come: read the new pipe from here on."""
        if not self._left:
            self.leave()
            # The other side has yet to read our MOVE, and closes the old pipe when it has.
        else:
            self._old.close()
        self._connection.move = None
        # Not from here: the frames of the old pipe are being read.
        asyncio.get_running_loop().call_soon(self._new.resume_reading)

    def give_up(self) -> None:
        """The connection is gone: so are both pipes."""
        self._old.abort()
        self._new.abort()

    def new_pipe_lost(self) -> None:
        """Before anything went over it: stay where we are."""
        if not self._left and self._connection.move is self:
            self._connection.move = None

    def old_pipe_lost(self) -> None:
        """With it, what the other side may still have said there; unless that was everything."""
        if self._connection.move is self:
            self._connection.fail(ConnectionLostError("the connection broke while it was moved"))

    def read_old(self) -> Connection:
        """Whose frames still come over the old pipe."""
        if self._connection.move is not self:
            raise ProtocolError("more on a pipe that was left")
        return self._connection


class _OldPipe(asyncio.BufferedProtocol):
    """Carries the other side's frames up to its MOVE; this side writes nothing more."""

    def __init__(self, move: Move) -> None:
        self._move = move

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._move.read_old().get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._move.read_old().buffer_updated(nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._move.old_pipe_lost()

    def eof_received(self) -> None:
        self._move.old_pipe_lost()


class _NewPipe(asyncio.BufferedProtocol):
    """Holds the place until this side says something there."""

    def __init__(self, move: Move) -> None:
        self._move = move

    def connection_lost(self, exc: Exception | None) -> None:
        self._move.new_pipe_lost()
