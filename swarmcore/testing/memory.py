"""A network inside one process: a transport without sockets, for tests and simulation.

It keeps the transport contract to the letter (bounded buffers, half-close, abort, proven peer ids) and uses
neither threads nor timers, so it runs under a virtual clock as well.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

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
from swarmcore.rpc.memory_stream import MemoryStream, StreamEnd
from swarmcore.tasks import BackgroundTasks
from swarmcore.transport import OnStream, Stream, Transport, serve_stream
from swarmcore.types import Address, short
from swarmcore.wire.limits import Limits

T = TypeVar("T", bound=Transport)


class InProcessTransport(Transport):
    """What transports between the peers of one process have in common: who listens, and how they end."""

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self.streams: dict[Any, None] = {}
        """Those that are open here."""
        self._on_stream: OnStream | None = None
        self._handlers = BackgroundTasks()
        self._closed = False

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._settle(self.listen_on)
        self._on_stream = on_stream
        return self._addresses()

    def _addresses(self) -> tuple[Address, ...]:
        places = self.announce or self.listen_on
        return tuple(Address(self.scheme, f"//{place}", self.identity.peer) for place in places)

    @abstractmethod
    def _settle(self, places: Sequence[str]) -> None:
        """Listen on ``places``; raise `AddressInUseError` when somebody does already."""

    @abstractmethod
    def _leave(self) -> None:
        """Listen nowhere any more."""

    def _checked(self, listener: T | None, address: Address) -> T:
        """``listener``, found at ``address``. Raise as `open_stream` does unless it answers there."""
        if self._closed:
            raise StreamClosedError("this transport is closed")
        if address.scheme != self.scheme or listener is None:
            raise PeerUnreachableError(f"nobody listens on {address}")
        if listener.identity.peer != address.peer:
            raise PeerIdentityError(f"{address} is answered by {short(listener.identity.peer)}")
        return listener

    def accept(self, stream: MemoryStream) -> None:
        """Serve a stream that another peer has opened; without a listener it is lost."""
        if self._closed or self._on_stream is None:
            gone = f"{short(self.identity.peer)} is gone"
            stream.drop(StreamClosedError("this transport is closed"), ConnectionLostError(gone))
            return
        serving = serve_stream(stream, self._on_stream)
        self._handlers.start(serving, f"{self.scheme} stream of {short(stream.remote)}")

    async def close(self) -> None:
        await self._shut(StreamAbortedError("the peer closed its transport"))

    async def crash(self) -> None:
        """Vanish like a killed process: the other ends see `ConnectionLostError`, not an orderly abort."""
        await self._shut(ConnectionLostError(f"the connection to {short(self.identity.peer)} was lost"))

    async def _shut(self, seen_by_remote: SwarmError) -> None:
        self._closed = True
        self._leave()
        for stream in list(self.streams):
            stream.drop(StreamClosedError("this transport was closed"), seen_by_remote)
        await self._handlers.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {short(self.identity.peer)} {len(self.streams)} streams>"


class MemoryTransport(InProcessTransport):
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
        self._listeners = network.listeners

    def move(self, *places: str) -> None:
        """Listen on ``places`` instead and tell `on_addresses`, as when the network changes.

        Open streams stay open. Raise `AddressInUseError` when somebody listens there.
        """
        self._leave()
        self._settle(places)
        self.listen_on = places
        self.on_addresses(self._addresses())

    def _settle(self, places: Sequence[str]) -> None:
        for place in places:
            if place in self._listeners:
                raise AddressInUseError(f"somebody listens on memory://{place} already; choose another place")
        self._listeners.update(dict.fromkeys(places, self))

    def _leave(self) -> None:
        for place in [place for place, transport in self._listeners.items() if transport is self]:
            del self._listeners[place]

    async def open_stream(self, address: Address) -> Stream:
        await asyncio.sleep(0)
        listener = self._checked(self._listeners.get(address.location.removeprefix("//")), address)
        near = MemoryStream(StreamEnd(self.identity.peer, self.limits, self.streams), address.peer)
        far = MemoryStream(
            StreamEnd(address.peer, listener.limits, listener.streams), remote=self.identity.peer
        )
        near.connect(far)
        listener.accept(far)
        return near


class MemoryNetwork:
    """The places where memory transports listen. Peers on different networks cannot reach each other."""

    def __init__(self) -> None:
        self.listeners: dict[str, MemoryTransport] = {}
        self._places = 0

    def transport(
        self, identity: Identity, limits: Limits | None = None, *, listen: bool = True
    ) -> MemoryTransport:
        """A new transport for ``identity``, listening on a place of its own unless ``listen`` is false."""
        self._places += 1
        listen_on = (str(self._places),) if listen else ()
        return MemoryTransport(identity, network=self, limits=limits, listen_on=listen_on)

    def __repr__(self) -> str:
        return f"<MemoryNetwork {len(self.listeners)} listening>"
