"""The three verbs: listen, open a stream, close."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar

from swarmcore.errors import (
    AddressError,
    AddressInUseError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import OnStream, Stream, Transport, serve_stream
from swarmcore.types import Address, PeerId
from swarmcore.wire.limits import Limits
from swarmcore_unix.handshake import prove
from swarmcore_unix.stream import UnixStream

logger = logging.getLogger(__name__)

_MAX_HANDSHAKES = 256
_BACKLOG = 1024


class UnixTransport(Transport):
    """Streams over Unix-domain sockets; ``listen_on`` holds paths."""

    scheme: ClassVar[str] = "unix"

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._servers: list[tuple[asyncio.Server, Path]] = []
        self._handshakes = 0
        self._streams: set[UnixStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._closed or self._handshakes >= _MAX_HANDSHAKES:
                writer.close()
            else:
                self._start(self._accept(reader, writer, on_stream))

        for path in map(Path, self.listen_on):
            server = await asyncio.start_unix_server(accept, sock=_bind(path), backlog=_BACKLOG)
            self._servers.append((server, path))
        return tuple(
            Address(self.scheme, f"//{path}", self.identity.peer) for path in self.announce or self.listen_on
        )

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_stream: OnStream
    ) -> None:
        self._handshakes += 1
        try:
            stream = await self._handshake(reader, writer, dialled=None)
        except (OSError, EOFError, SwarmError) as exc:
            logger.debug("refused an incoming connection: %r", exc)
            return
        finally:
            self._handshakes -= 1
        await serve_stream(stream, on_stream)

    async def open_stream(self, address: Address) -> Stream:
        if self._closed:
            raise StreamClosedError("this transport is closed")
        if address.scheme != self.scheme or not address.location.startswith("//"):
            raise AddressError(f"{address} is not of the form unix:///path/<peer id>")
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                reader, writer = await asyncio.open_unix_connection(address.location[2:])
                stream = await self._handshake(reader, writer, dialled=address.peer)
        except EOFError as exc:
            raise PeerIdentityError(f"what answers at {address} does not prove that it is that peer") from exc
        except OSError as exc:  # TimeoutError is one
            raise PeerUnreachableError(f"cannot reach {address}: {exc}") from exc
        if self._closed:
            await stream.close()
            raise StreamClosedError("this transport was closed during the dial")
        return stream

    async def _handshake(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, dialled: PeerId | None
    ) -> UnixStream:
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                remote = await prove(reader, writer, self.identity, dialled=dialled)
        except BaseException:
            writer.transport.abort()
            raise
        stream = UnixStream(reader, writer, remote, self.limits)
        self._streams.add(stream)
        self._start(self._run(stream))
        return stream

    async def _run(self, stream: UnixStream) -> None:
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self._closed = True
        for server, path in self._servers:
            server.close()
            path.unlink(missing_ok=True)
        self._servers.clear()
        for stream in tuple(self._streams):
            stream.drop("the transport was closed")
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _bind(path: Path) -> socket.socket:
    """A socket bound to ``path``; one left behind by a process that is gone is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(str(path))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or _answers(path):
                raise
            path.unlink()
            sock.bind(str(path))
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"another process listens on {path}; choose another path") from exc
        raise AddressError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return sock


def _answers(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True
