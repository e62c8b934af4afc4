"""A network inside one process: a transport without sockets, for tests and simulation.

It keeps the transport contract to the letter (bounded buffers, half-close, abort, proven peer ids) and uses
neither threads nor timers, so it runs under a virtual clock as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from swarmcore.errors import (
    AddressInUseError,
    ConnectionLostError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.rpc.memory_stream import MemoryStream, StreamEnd, stream_pair
from swarmcore.transport import OnStream, Stream, Transport, serve_stream
from swarmcore.types import Address, short
from swarmcore.wire.limits import Limits


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
        near, far = stream_pair(
            StreamEnd(self.identity.peer, self.limits, self._streams),
            StreamEnd(listener.identity.peer, listener.limits, listener._streams),
        )
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
            stream.drop(StreamClosedError("this transport was closed"), seen_by_remote)
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        return f"<MemoryTransport {short(self.identity.peer)} {len(self._streams)} streams>"
