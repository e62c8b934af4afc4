"""A connection, and the stream it carries, changes its byte transport while both sides talk.

The dialler opens the new transport and asks there to ``RESUME`` the connection; the listener agrees with a
``RESUME`` of its own. Then the dialler ends what it writes on the old transport with ``MOVE`` and goes on on
the new one; when the listener has read that, it does the same.

Two transports deliver each in order, and in no order between them: the first bytes on the new, faster one
would overtake the last on the old one. So each side reads the old transport to its ``MOVE`` before it reads
the new one, and no frame is lost, doubled or out of turn, whatever was under way. Nothing is sent twice and
no frame carries a sequence number: the transports are reliable, unlike the paths between which QUIC (RFC
9000, section 9) and MPTCP (RFC 8684) migrate, which have to number and repeat.
"""

from __future__ import annotations

import asyncio

from swarmcore.errors import ConnectionLostError, ProtocolError
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.frames import FrameType, encode_frame

TOKEN_BYTES = 16
"""Length of the random name by which the two ends of a connection know it."""


class Migration:
    """One side of one migration. ``new`` is silent so far and not read until the old transport has ended."""

    def __init__(self, connection: Connection, new: asyncio.Transport) -> None:
        assert connection.transport
        self._connection = connection
        self._old = connection.transport
        self._new = new
        self._switched = False  # this side has written MOVE
        new.pause_reading()
        new.set_protocol(_NewTransport(self))

    def switch(self) -> None:
        """Write the last frame on the old transport; whatever follows goes over the new one."""
        connection = self._connection
        connection.write(encode_frame(FrameType.MOVE))
        self._switched = True
        self._old.set_protocol(_OldTransport(self))
        connection.switch_to(self._new)

    def peer_switched(self) -> None:
        """The other side's ``MOVE`` has come: read the new transport from here on."""
        if not self._switched:
            # The listener's turn. It leaves the old transport open: closing it here could cut off the MOVE
            # that was just written. The dialler closes it when it has read that.
            self.switch()
        else:
            self._old.close()
        self._connection.migration = None
        # Not from here: the frame reader is in the midst of what the old transport has brought, and must not
        # be entered again by the new one.
        asyncio.get_running_loop().call_soon(self._new.resume_reading)

    def abort(self) -> None:
        """The connection is gone: so are both transports."""
        self._old.abort()
        self._new.abort()

    def new_transport_lost(self) -> None:
        """Before anything went over it: stay with the old one."""
        if not self._switched and self._connection.migration is self:
            self._connection.migration = None

    def old_transport_lost(self) -> None:
        """With it, what the other side may still have written there; unless that was everything."""
        if self._connection.migration is self:
            self._connection.fail(ConnectionLostError("the connection broke while it migrated"))

    def reading_old(self) -> Connection:
        """The connection whose frames still come over the old transport."""
        if self._connection.migration is not self:
            raise ProtocolError("more on a transport that was left")
        return self._connection


class _OldTransport(asyncio.BufferedProtocol):
    """Brings the other side's frames up to its MOVE; this side writes nothing more."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._migration.reading_old().get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._migration.reading_old().buffer_updated(nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._migration.old_transport_lost()

    def eof_received(self) -> None:
        self._migration.old_transport_lost()


class _NewTransport(asyncio.BufferedProtocol):
    """In place of the connection until this side writes there."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration

    def connection_lost(self, exc: Exception | None) -> None:
        self._migration.new_transport_lost()
