"""Repairs of py-libp2p's host and swarm: streams, dials, listening, closing, log messages."""

from __future__ import annotations

import errno
import logging
import os
import socket

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.swarm import Swarm
from multiaddr import Multiaddr

from swarmcore.errors import AddressError, AddressInUseError
from swarmcore.types import short
from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p.patches.yamux import QueuedMuxer, missing_attributes

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 3.0
_LISTEN_SECONDS = 3.0
_RESET_SECONDS = 1.0


def install(swarm: Swarm, limits: Limits) -> None:
    """Repair ``swarm``, which has no connection yet."""
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.auto_connector = NoAutoConnector(swarm)
    _guard_streams(swarm)
    install_yamux(swarm, limits)


def install_yamux(swarm: Swarm, limits: Limits) -> None:
    """Let every connection of ``swarm`` be a `QueuedYamux`, unless py-libp2p's yamux is not as it was."""
    if names := missing_attributes(swarm):
        logger.warning(
            "this version of py-libp2p has no %s: its own yamux is used, which may stop for good under load; "
            "install libp2p 0.8",
            ", ".join(names),
        )
    else:
        swarm.upgrader.muxer_multistream = QueuedMuxer(limits)


class NoAutoConnector(AutoConnector):
    """Repairs: without it, whomever the peer store knows is dialled, up to half of the high watermark.

    To whom this peer connects is decided by those who use the host.
    """

    async def maybe_connect(self) -> None:
        return


def _guard_streams(swarm: Swarm) -> None:
    """Repairs: one stream that goes wrong, as by a protocol name that is no text, ends the whole host."""
    unguarded = swarm.common_stream_handler

    async def guarded(stream: INetStream) -> None:
        try:
            await unguarded(stream)
        except Exception as exc:
            logger.info("a stream of %s was dropped: %r", short(str(stream.muxed_conn.peer_id)), exc)
            await reset(stream)

    swarm.set_stream_handler(guarded)


async def reset(stream: INetStream) -> None:
    """Reset ``stream`` within a second, also when the task that calls is cancelled."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _RESET_SECONDS):
        await stream.reset()


async def listen(swarm: Swarm, place: Multiaddr) -> None:
    """Listen on ``place``. Raise `AddressInUseError` or `AddressError` when that cannot be done.

    Repairs: the library shares its port with whoever asks, so that two servers on one port would each get
    half of the connections; and it leaks a socket when it is cancelled, so it is shielded, as for an IP
    address it takes milliseconds.
    """
    _check_free(place)
    listens = False
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _LISTEN_SECONDS):
        listens = await swarm.listen(place)
    if not listens:
        raise AddressError(f"cannot listen on {place}: it is not an address of this machine")


def _check_free(place: Multiaddr) -> None:
    version = 6 if "ip6" in (protocol.name for protocol in place.protocols()) else 4
    host, port = str(place.value_for_protocol(f"ip{version}")), int(place.value_for_protocol("tcp") or 0)
    with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == 6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"cannot listen on {place}: the port is in use; choose another, or 0 for any free one"
                ) from exc
            raise AddressError(f"cannot listen on {place}: {exc.strerror}") from exc


async def close(swarm: Swarm) -> None:
    """Close all connections of ``swarm``, and then it, within seconds.

    Repairs: the library closes one connection after the other, 200 ms for each.
    """
    with trio.move_on_after(_CLOSE_SECONDS):
        async with trio.open_nursery() as nursery:
            for connection in swarm.get_connections():
                nursery.start_soon(_close_connection, connection)
        await swarm.close()


async def _close_connection(connection: INetConn) -> None:
    with trio.move_on_after(_CLOSE_SECONDS):  # also when nobody answers there
        await connection.close()


class _Demoted(logging.Handler):
    """Logs again at level DEBUG, under a name of ours, what the library logs at whatever level."""

    _logger = logging.getLogger(f"{__name__}.library")

    def emit(self, record: logging.LogRecord) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._logger.debug("%s: %s", record.name, record.getMessage())


def demote_logs() -> None:
    """From now on, nothing of py-libp2p is above DEBUG, and its messages about every frame are left out.

    Repairs: the library warns of what is daily life on the Internet (peers that go, scanners, handshakes that
    fail), and Python would print that on stderr; and one module logs through the root logger, which gives
    every program that uses it a handler on stderr. Where ``LIBP2P_DEBUG`` is set in the environment, the
    library logs as it says there.
    """
    library = logging.getLogger("libp2p")
    if not os.environ.get("LIBP2P_DEBUG") and not any(isinstance(one, _Demoted) for one in library.handlers):
        library.addHandler(_Demoted())
        library.setLevel(logging.INFO)
    addresses = logging.getLogger("multiaddr")
    if addresses.level == logging.NOTSET:
        addresses.setLevel(logging.INFO)  # at DEBUG it logs every byte of every address
    if vars(swarm_connection).get("logging") is logging:
        swarm_connection.logging = logging.getLogger(swarm_connection.__name__)  # type: ignore[assignment, attr-defined]
