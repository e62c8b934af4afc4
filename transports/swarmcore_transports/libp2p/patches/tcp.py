"""TCP as py-libp2p has it, with sockets that are let go when their connection ends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Collection

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr

from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p.multiaddrs import host_of, port_of
from swarmcore_transports.libp2p.socket_accounting import SocketAccounting


class TcpSockets(TCP):
    """To be given to ``new_host``. No Nagle's delay: trio's sockets have none."""

    def __init__(self, limits: Limits, accounting: SocketAccounting) -> None:
        super().__init__(dns_resolution_timeout=max(0.1, limits.connect_timeout / 3))
        self._lost_after = 3 * limits.keepalive
        self._accounting = accounting
        self._open: set[TcpSocket] = set()

    def create_listener(self, handler_function: Callable[[ReadWriteCloser], Awaitable[None]]) -> TCPListener:
        """Repairs: the handler of a connection ends with the host, so each keeps its place among the most."""

        async def until_closed(stream: ReadWriteCloser) -> None:
            assert isinstance(stream, TrioTCPStream)
            with trio.CancelScope() as scope:
                await handler_function(self._opened(stream.stream, scope))

        return TCPListener(until_closed)

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> RawConnection:
        if source is not None:
            return RawConnection(self._opened(await _connected(maddr, source)), True)
        raw = await super()._dial_resolved(maddr)
        assert isinstance(raw, RawConnection) and isinstance(raw.stream, TrioTCPStream)
        return RawConnection(self._opened(raw.stream.stream), True)

    def _opened(self, stream: trio.SocketStream, handler: trio.CancelScope | None = None) -> TcpSocket:
        opened = TcpSocket(stream, self._lost_after, self._closed, handler)
        self._open.add(opened)
        self._accounting.opened(opened, dialled=handler is None)
        return opened

    def _closed(self, sock: TcpSocket) -> None:
        self._open.discard(sock)
        self._accounting.closed(sock)

    def at(self, remote: tuple[str, int] | None) -> TcpSocket | None:
        """The open socket whose other end is ``remote``."""
        return next((one for one in self._open if one.get_remote_address() == remote), None)

    def cut(self, hosts: Collection[str]) -> int:
        """End the connections from those of this machine's addresses that are gone; how many those were.

        Nothing that is sent from there arrives, and TCP by itself would take minutes to say so.
        """
        lost = [one for one in self._open if one.local_host in hosts]
        for one in lost:
            one.cut()
        return len(lost)

    def close_all(self) -> None:
        """Close what is still open, without a word to those at the other ends: for use after a crash."""
        for one in tuple(self._open):
            one.stream.socket.close()
            self._closed(one)


async def _connected(target: Multiaddr, source: tuple[str, int]) -> trio.SocketStream:
    """Repairs: a dial from ``source``, which may be where the host listens, leaks a socket when cancelled."""
    connecting = trio.socket.socket(socket.AF_INET6 if ":" in source[0] else socket.AF_INET)
    try:
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await connecting.bind(source)
        await connecting.connect((host_of(target), port_of(target)))
    except BaseException:
        connecting.close()
        raise
    return trio.SocketStream(connecting)


class TcpSocket(TrioTCPStream):
    """A socket that calls ``closed`` and cancels ``handler`` when it is closed."""

    def __init__(
        self,
        stream: trio.SocketStream,
        lost_after: float,
        closed: Callable[[TcpSocket], None],
        handler: trio.CancelScope | None,
    ) -> None:
        super().__init__(stream)
        self._closed = closed
        self._handler = handler
        with contextlib.suppress(OSError):  # the peer may have gone already
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * lost_after))
        self.local_host = ""
        with contextlib.suppress(OSError):
            self.local_host = str(stream.socket.getsockname()[0]).removeprefix("::ffff:")
        self.get_remote_address()  # remembered from now on: a lost socket has none

    def get_remote_address(self) -> tuple[str, int] | None:
        """Repairs: IPv6 sockets, whose addresses have four parts, have none."""
        if self._cached_remote_address is None:
            with contextlib.suppress(OSError):
                host, port = self.stream.socket.getpeername()[:2]
                self._cached_remote_address = str(host), int(port)
        return self._cached_remote_address

    def cut(self) -> None:
        """End the connection; who reads from it closes it."""
        with contextlib.suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        # Shielded, as whoever closes during a handshake goes on to hand back what the connection held.
        with trio.CancelScope(shield=True):
            await super().close()
        self._closed(self)
        if self._handler:
            self._handler.cancel()
