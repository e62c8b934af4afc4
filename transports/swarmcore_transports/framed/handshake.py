"""The beginning of connections over pipes whose ends are proven: each side says ``HELLO`` and what it takes.

The dialler's hello also brings the token by which the connection may later be moved to another pipe.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Protocol

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError, ResourceLimitError
from swarmcore.resources import Resource
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connections import Connections
from swarmcore_transports.framed.frames import SETTINGS_BYTES, Kind, Settings, encode_frame
from swarmcore_transports.framed.migration import TOKEN_BYTES


class Pipe(Protocol):
    """A byte pipe with the face of an `asyncio.Transport`, which moves nothing before `start`."""

    def start(self, protocol: asyncio.BufferedProtocol) -> None: ...

    def abort(self) -> None: ...


class Greeter:
    """Makes connections of pipes."""

    def __init__(self, connections: Connections, limits: Limits) -> None:
        self._connections = connections
        self._limits = limits
        self._settings = Settings.of(limits).encode()
        self._half_open: set[Connection] = set()

    @property
    def half_open(self) -> int:
        """How many accepted pipes have not said hello yet."""
        return len(self._half_open)

    async def dialled(self, pipe: Pipe, peer: PeerId) -> Connection:
        """A connection to ``peer`` over ``pipe``, ready for a stream.

        Raise `PeerUnreachableError` when it breaks before; the caller sets the deadline.
        """
        connection = Connection(self._connections, self._limits, self._greet(peer))
        connection.token = secrets.token_bytes(TOKEN_BYTES)
        try:
            pipe.start(connection)
            connection.write(encode_frame(Kind.HELLO, self._settings + connection.token))
            await connection.established
            if connection.error:  # lost again before this task had its turn
                raise PeerUnreachableError(connection.error.message)
        except BaseException:
            connection.fail(PeerUnreachableError("the dial was given up"))
            raise
        return connection

    def accepted(self, pipe: Pipe, peer: PeerId) -> None:
        """Wait over ``pipe`` for the hello of ``peer`` and for its streams."""
        connection = Connection(self._connections, self._limits, self._greet(peer), self._connections.opened)
        try:
            half_open = self._connections.resources.reserve(
                peer,
                Resource.CONNECTIONS,
                evict=lambda: connection.fail(ConnectionLostError("others said hello")),
            )
        except ResourceLimitError:
            pipe.abort()
            return

        def done(_: asyncio.Future[None]) -> None:
            half_open.release()
            self._half_open.discard(connection)

        self._half_open.add(connection)
        connection.established.add_done_callback(done)
        pipe.start(connection)
        connection.write(encode_frame(Kind.HELLO, self._settings))
        asyncio.get_running_loop().call_later(self._limits.connect_timeout, _give_up, connection)

    def _greet(self, peer: PeerId) -> Callable[[Connection, Kind, bytes], None]:
        def greet(connection: Connection, kind: Kind, body: bytes) -> None:
            if kind is not Kind.HELLO or len(body) not in (SETTINGS_BYTES, SETTINGS_BYTES + TOKEN_BYTES):
                raise ProtocolError(f"{kind.name} of {len(body)} bytes instead of a hello")
            connection.establish(peer, Settings.decode(body[:SETTINGS_BYTES]))
            if connection.accepts:
                connection.token = body[SETTINGS_BYTES:]
                self._connections.connection_idle(connection)

        return greet


def _give_up(connection: Connection) -> None:
    if connection.remote is None and not connection.error:
        connection.fail(ConnectionLostError("the peer did not say its settings"))
