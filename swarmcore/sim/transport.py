"""The transport of a simulated host."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from swarmcore.errors import (
    AddressInUseError,
    ConnectionLostError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamAbortedError,
    StreamClosedError,
)
from swarmcore.identity import Identity
from swarmcore.sim.stream import Connection, SimStream, connect_ends
from swarmcore.transport import OnStream, Stream, Transport, serve_stream
from swarmcore.types import Address, short
from swarmcore.wire.limits import Limits

if TYPE_CHECKING:
    from swarmcore.sim.hosts import Host
    from swarmcore.sim.network import SimNetwork


class SimTransport(Transport):
    """Connects the hosts of one `SimNetwork`. Addresses are ``sim://<host number>/<peer id>``.

    The first stream to a host waits for the handshakes of a TCP and TLS connection; a later one takes over a
    connection that a stream before it has left, if there is one.
    """

    scheme: ClassVar[str] = "sim"

    def __init__(
        self,
        identity: Identity,
        *,
        network: SimNetwork,
        host: Host,
        limits: Limits | None = None,
        listen: bool = True,
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=(str(host.index),) if listen else ())
        self.network = network
        self.host = host
        self._boot = host.boots
        self._on_stream: OnStream | None = None
        self._handlers: dict[asyncio.Task[None], None] = {}
        self._closed = False

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        if self.host.listener is not None:
            raise AddressInUseError(f"a process listens on host {self.host.index} already")
        self._on_stream = on_stream
        self.host.listener = self
        return (Address(self.scheme, f"//{self.host.index}", self.identity.peer),)

    async def open_stream(self, address: Address) -> Stream:
        await asyncio.sleep(0)
        target = self.network.host_at(address)
        if target is None:
            raise PeerUnreachableError(f"{address} is no place on this network")
        connection = self.network.take(self.host, target) or await self._dial(address, target)
        if self._closed:
            raise StreamClosedError("this transport is closed")
        listener = target.listener
        if listener is None:
            raise PeerUnreachableError(f"nobody listens on {address}")
        if listener.identity.peer != address.peer:
            raise PeerIdentityError(f"{address} is answered by {short(listener.identity.peer)}")
        near = SimStream(self, target, listener, connection)
        far = SimStream(listener, self.host, self, connection)
        connect_ends(near, far)
        if self.network.blocked(self.host, target):
            self.network.fall_silent(near)
        near.knock()
        return near

    async def _dial(self, address: Address, target: Host) -> Connection:
        network = self.network
        if network.blocked(self.host, target):
            await asyncio.sleep(self.limits.connect_timeout)
            raise PeerUnreachableError(f"{address} did not answer")
        round_trip = 2 * network.delay(self.host, target)
        if target.listener is None:
            await asyncio.sleep(round_trip)
            raise PeerUnreachableError(f"nobody listens on {address}")
        boot = target.boots
        await asyncio.sleep(network.handshakes * round_trip)
        if network.blocked(self.host, target):
            await asyncio.sleep(self.limits.connect_timeout)
            raise PeerUnreachableError(f"{address} fell silent")
        if target.boots != boot or target.listener is None:
            raise PeerUnreachableError(f"{address} went away")
        return Connection(self.host, target, boot)

    def arrived(self, stream: SimStream) -> None:
        """A stream that another host opened has come here."""
        if self._closed or self._on_stream is None:
            stream.spoil()
            stream.drop(
                StreamClosedError("this transport is closed"),
                ConnectionLostError(f"{short(self.identity.peer)} is gone"),
            )
            return
        serving = serve_stream(stream, self._on_stream)
        task = asyncio.create_task(serving, name=f"stream of {short(stream.remote)}")
        self._handlers[task] = None
        task.add_done_callback(self._handled)

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._handlers.pop(task, None)

    async def close(self) -> None:
        self._stop_listening()
        for stream in self._streams():
            stream.drop(
                StreamClosedError("this transport was closed"),
                StreamAbortedError("the peer closed its transport"),
            )
        await self._end_handlers()

    def crash(self) -> None:
        """Vanish like a killed process: the other ends see `ConnectionLostError` as soon as they hear of it.

        With the power of the machine gone nobody tells them: they learn from the silence.
        """
        self._stop_listening()
        for stream in self._streams():
            stream.spoil()
            if self.host.power:
                stream.drop(
                    StreamClosedError("this process was killed"),
                    ConnectionLostError(f"the connection to {short(self.identity.peer)} was lost"),
                )
            else:
                stream.lose(StreamClosedError("this process was killed"))
        for task in list(self._handlers):
            task.cancel()

    def _stop_listening(self) -> None:
        self._closed = True
        if self.host.listener is self:
            self.host.listener = None

    def _streams(self) -> list[SimStream]:
        return [stream for stream in self.host.streams if stream.belongs_to(self)]

    async def _end_handlers(self) -> None:
        tasks = [task for task in self._handlers if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        return f"<SimTransport {short(self.identity.peer)} on host {self.host.index}>"
