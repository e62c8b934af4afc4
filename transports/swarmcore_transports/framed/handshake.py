"""The handshake over byte transports whose ends are proven: each side says ``HELLO`` and what it takes.

The dialler's hello also brings the token by which the connection may later migrate to another transport.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Protocol

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError, ResourceLimitError
from swarmcore.resources import Resource
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection, HandshakeHandler
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.frames import SETTINGS_BYTES, FrameType, Settings, encode_frame
from swarmcore_transports.framed.migration import TOKEN_BYTES


class ByteTransport(Protocol):
    """An `asyncio.Transport` that moves nothing before `start`."""

    def start(self, protocol: asyncio.BufferedProtocol) -> None: ...

    def abort(self) -> None: ...


class Handshaker:
    """Makes connections of byte transports."""

    def __init__(self, connections: ConnectionManager, limits: Limits) -> None:
        self._connections = connections
        self._limits = limits
        self._settings = Settings.of(limits).encode()
        self._half_open: set[Connection] = set()

    @property
    def half_open(self) -> int:
        """How many accepted transports have not brought a hello yet."""
        return len(self._half_open)

    async def dial(self, transport: ByteTransport, peer: PeerId) -> Connection:
        """A connection to ``peer`` over ``transport``, ready for a stream.

        Raise `PeerUnreachableError` when it breaks before; the caller sets the deadline.
        """
        connection = Connection(self._connections, self._limits, self._handler(peer))
        connection.token = secrets.token_bytes(TOKEN_BYTES)
        try:
            transport.start(connection)
            connection.write(encode_frame(FrameType.HELLO, self._settings + connection.token))
            await connection.established
            if connection.error:  # lost again before this task had its turn
                raise PeerUnreachableError(connection.error.message)
        except BaseException:
            connection.fail(PeerUnreachableError("the dial was given up"))
            raise
        return connection

    def accept(self, transport: ByteTransport, peer: PeerId) -> None:
        """Wait on ``transport`` for the hello of ``peer`` and for its streams."""
        connection = Connection(
            self._connections, self._limits, self._handler(peer), self._connections.accept_stream
        )
        try:
            half_open = self._connections.resources.reserve(
                peer,
                Resource.CONNECTIONS,
                evict=lambda: connection.fail(ConnectionLostError("others said hello")),
            )
        except ResourceLimitError:
            transport.abort()
            return

        def done(_: asyncio.Future[None]) -> None:
            half_open.release()
            self._half_open.discard(connection)

        self._half_open.add(connection)
        connection.established.add_done_callback(done)
        transport.start(connection)
        connection.write(encode_frame(FrameType.HELLO, self._settings))
        asyncio.get_running_loop().call_later(self._limits.connect_timeout, _give_up, connection)

    def _handler(self, peer: PeerId) -> HandshakeHandler:
        def handle(connection: Connection, frame: FrameType, body: bytes) -> None:
            if frame is not FrameType.HELLO or len(body) not in (
                SETTINGS_BYTES,
                SETTINGS_BYTES + TOKEN_BYTES,
            ):
                raise ProtocolError(f"{frame.name} of {len(body)} bytes instead of a hello")
            connection.establish(peer, Settings.decode(body[:SETTINGS_BYTES]))
            if connection.accepts:
                connection.token = body[SETTINGS_BYTES:]
                self._connections.connection_idle(connection)

        return handle


def _give_up(connection: Connection) -> None:
    if connection.remote is None and not connection.error:
        connection.fail(ConnectionLostError("the peer did not say its settings"))
