"""A network inside one process: a transport without sockets, for tests and simulation.

It keeps the transport contract to the letter (bounded buffers, half-close, abort, proven peer ids) and uses
neither threads nor timers, so it runs under a virtual clock as well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from swarmcore.errors import (
    AddressInUseError,
    ConnectionLostError,
    MessageTooLargeError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import Buffer, OnStream, Stream, Transport, serve_stream
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits

_MESSAGE_OVERHEAD = 64  # what a queued message costs besides its bytes: a flood of empty ones is bounded too
_REASON_LENGTH = 200


class MemoryNetwork:
    """The places where memory transports listen. Peers on different networks cannot reach each other."""

    def __init__(self) -> None:
        self._listeners: dict[str, MemoryTransport] = {}
        self._places = 0

    def transport(
        self, identity: Identity, limits: Limits | None = None, *, listen: bool = True
    ) -> MemoryTransport:
        """A new transport for ``identity``, listening on a place of its own unless ``listen`` is false."""
        self._places += 1
        listen_on = (str(self._places),) if listen else ()
        return MemoryTransport(identity, network=self, limits=limits, listen_on=listen_on)

    def __repr__(self) -> str:
        return f"<MemoryNetwork {len(self._listeners)} listening>"


class MemoryTransport(Transport):
    """Connects the peers of one `MemoryNetwork`. Addresses are ``memory://<place>/<peer id>``."""

    scheme: ClassVar[str] = "memory"

    def __init__(
        self,
        identity: Identity,
        *,
        network: MemoryNetwork,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._network = network
        self._on_stream: OnStream | None = None
        self._streams: set[MemoryStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._settle(self.listen_on)
        self._on_stream = on_stream
        return self._addresses()

    def move(self, *places: str) -> None:
        """Listen on ``places`` instead and tell `on_addresses`, as when the network changes.

        Open streams stay open. Raise `AddressInUseError` when somebody listens there.
        """
        self._leave()
        self._settle(places)
        self.listen_on = places
        self.on_addresses(self._addresses())

    def _settle(self, places: Sequence[str]) -> None:
        listeners = self._network._listeners
        for place in places:
            if place in listeners:
                raise AddressInUseError(f"somebody listens on memory://{place} already; choose another place")
        listeners.update(dict.fromkeys(places, self))

    def _leave(self) -> None:
        listeners = self._network._listeners
        for place in [place for place, transport in listeners.items() if transport is self]:
            del listeners[place]

    def _addresses(self) -> tuple[Address, ...]:
        places = self.announce or self.listen_on
        return tuple(Address(self.scheme, f"//{place}", self.identity.peer) for place in places)

    async def open_stream(self, address: Address) -> Stream:
        await asyncio.sleep(0)
        if self._closed:
            raise StreamClosedError("this transport is closed")
        listener = self._network._listeners.get(address.location.removeprefix("//"))
        if address.scheme != self.scheme or listener is None:
            raise PeerUnreachableError(f"nobody listens on {address}")
        if listener.identity.peer != address.peer:
            raise PeerIdentityError(f"{address} is answered by {short(listener.identity.peer)}")
        near = MemoryStream(self, listener.identity.peer)
        far = MemoryStream(listener, self.identity.peer)
        near._join(far)
        listener._accept(far)
        return near

    def _accept(self, stream: MemoryStream) -> None:
        assert self._on_stream is not None
        serving = serve_stream(stream, self._on_stream)
        task = asyncio.create_task(serving, name=f"memory stream of {short(stream.remote)}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await self._shut(StreamAbortedError("the peer closed its transport"))

    async def crash(self) -> None:
        """Vanish like a killed process: the other ends see `ConnectionLostError`, not an orderly abort."""
        await self._shut(ConnectionLostError(f"the connection to {short(self.identity.peer)} was lost"))

    async def _shut(self, seen_by_remote: SwarmError) -> None:
        self._closed = True
        self._leave()
        for stream in list(self._streams):
            stream._drop(StreamClosedError("this transport was closed"), seen_by_remote)
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        return f"<MemoryTransport {short(self.identity.peer)} {len(self._streams)} streams>"


class MemoryStream(Stream):
    """One end of a stream between two memory transports. Each message is copied once, when it is sent."""

    def __init__(self, transport: MemoryTransport, remote: PeerId) -> None:
        self.remote = remote
        self.path = "direct"
        self._transport = transport
        self._incoming = _Pipe(transport.limits.send_buffer)
        self._outgoing = _Pipe(transport.limits.send_buffer)
        transport._streams.add(self)

    def _join(self, other: MemoryStream) -> None:
        other._incoming = self._outgoing
        other._outgoing = self._incoming

    async def send(self, *buffers: Buffer) -> None:
        size = sum(len(buffer) for buffer in buffers)
        limit = self._transport.limits.max_message
        if size > limit:
            raise MessageTooLargeError(
                f"message of {size} bytes is above the limit of {limit}; send it in parts"
            )
        await self._outgoing.put(buffers, size)

    async def receive(self) -> memoryview:
        return await self._incoming.get()

    async def end(self) -> None:
        self._outgoing.end()

    async def close(self) -> None:
        self._outgoing.end()
        self._incoming.drop(
            for_reader=StreamClosedError("the stream was closed on this side"),
            for_writer=StreamClosedError("the remote closed the stream"),
        )
        self._transport._streams.discard(self)

    def abort(self, reason: str) -> None:
        reason = reason[:_REASON_LENGTH]
        self._drop(StreamClosedError(f"the stream was aborted here: {reason}"), StreamAbortedError(reason))

    def _drop(self, seen_here: SwarmError, seen_there: SwarmError) -> None:
        if self not in self._transport._streams:
            return  # closed before: what was sent is still to be delivered
        self._incoming.drop(for_reader=seen_here, for_writer=seen_there)
        self._outgoing.drop(for_reader=seen_there, for_writer=seen_here)
        self._transport._streams.discard(self)

    def __repr__(self) -> str:
        waiting = len(self._incoming.messages)
        return (
            f"<MemoryStream {short(self._transport.identity.peer)} ⇄ {short(self.remote)} {waiting} waiting>"
        )


class _Pipe:
    """One direction of a stream: messages on their way, bounded in bytes."""

    def __init__(self, bound: int) -> None:
        self.messages: deque[bytearray] = deque()
        self._bound = bound
        self._nbytes = 0
        self._ended = False
        self._reader_error: SwarmError | None = None
        self._writer_error: SwarmError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def put(self, buffers: Sequence[Buffer], size: int) -> None:
        cost = size + _MESSAGE_OVERHEAD
        while True:
            if self._writer_error is not None:
                raise _copy(self._writer_error)
            if self._ended:
                raise StreamClosedError("this side has ended the stream")
            # A message above the bound passes alone: waiting could never make room for it.
            if not self.messages or self._nbytes + cost <= self._bound:
                break
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self.messages.append(bytearray().join(buffers))
        self._nbytes += cost
        _wake(self._reader)

    async def get(self) -> memoryview:
        while not self.messages:
            if self._reader_error is not None:
                raise _copy(self._reader_error)
            if self._ended:
                raise StreamClosedError("the remote ended the stream")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self.messages.popleft()
        self._nbytes -= len(message) + _MESSAGE_OVERHEAD
        _wake(self._writer)
        return memoryview(message)

    def end(self) -> None:
        self._ended = True
        _wake(self._reader)
        _wake(self._writer)

    def drop(self, *, for_reader: SwarmError, for_writer: SwarmError) -> None:
        """Forget what is on its way and fail both ends; the first failure is the one that stays."""
        self._reader_error = self._reader_error or for_reader
        self._writer_error = self._writer_error or for_writer
        self.messages.clear()
        self._nbytes = 0
        _wake(self._reader)
        _wake(self._writer)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _copy(error: SwarmError) -> SwarmError:
    # One exception object raised again and again would gather the traceback of each raise.
    return type(error)(error.message, **error.details)
