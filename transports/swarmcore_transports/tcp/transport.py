"""The TCP transport: one TLS connection per stream, kept for the next one when the stream ends well."""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
import socket
import ssl
from collections.abc import Iterable, Sequence

from swarmcore.errors import (
    AddressError,
    InputError,
    PeerIdentityError,
    PeerUnreachableError,
    ProtocolError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.resources import Reservation, Resource
from swarmcore.tasks import cancel_and_wait
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import RETIRE_SECONDS, Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.frames import FrameType, Settings, encode_frame
from swarmcore_transports.listener import Endpoint, Listener, hang_up
from swarmcore_transports.local_addresses import NetworkMonitor, available, loopback_note, loopback_only
from swarmcore_transports.tcp.addresses import (
    SCHEME,
    addresses_to_announce,
    connect,
    endpoint_of,
    parse_announced,
)
from swarmcore_transports.tcp.handshake import (
    CHALLENGE_BYTES,
    SecureChannel,
    answer_hello,
    check_certificate,
    check_proof,
    dialler_context,
    listener_context,
    make_hello,
)

logger = logging.getLogger(__name__)


class TcpTransport(Transport):
    """Streams over TLS 1.3 on TCP; addresses are ``tcp://host:port/<peer id>``.

    ``listen_on`` and ``announce`` hold ``host:port`` or ``[v6]:port``; port 0 takes a free one. A wildcard
    host is announced as this machine's own addresses, as they come and go; one of a family that this machine
    does not have is passed over where there is another place.
    """

    scheme = SCHEME
    default_places = ("0.0.0.0:{port}", "[::]:{port}")

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._settings = Settings.of(self.limits)
        self._dialler_context = dialler_context()
        self._listener_context: ssl.SSLContext | None = None
        self._certificate = b""
        self._listening = False
        self._listeners: list[Listener] = []
        self._announced: tuple[Address, ...] = ()
        self._watch: asyncio.Task[None] | None = None
        self._connections = ConnectionManager(self.limits, _has_input, lambda: self.resources)
        # Tasks that bring a socket to TLS, either way. None is cancelled; `hang_up` ends it.
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}
        self._dials: set[asyncio.Timeout] = set()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._listeners else "open"
        connections = f"{len(self._connections)} connections, {self._connections.idle} idle"
        return f"<TcpTransport {short(self.identity.peer)} {state} · {connections}>"

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        return parse_announced(place.removesuffix(f"/{peer}"), peer)

    # --- listening ----------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._listening:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['host:port']")
        endpoints = [Endpoint.parse(place) for place in self.listen_on]
        for text in self.announce:  # a mistake there shows before anything is bound
            parse_announced(text, self.identity.peer)
        self._listening = True
        self._connections.serve(on_stream)
        try:
            self._listener_context, self._certificate = await asyncio.to_thread(
                listener_context, self.identity
            )
            for endpoint in available(endpoints, lambda endpoint: endpoint.host):
                self._listeners.append(await Listener.bind(endpoint, self._accepted, lambda: self.resources))
        except BaseException:
            self._stop_listening()
            self._listening = False
            raise
        monitor = NetworkMonitor(self._network_changed, asyncio.sleep)
        self._announced = self._addresses()
        self._watch = asyncio.create_task(monitor.run(), name="network monitor")
        return self._announced

    @property
    def _bound(self) -> list[Endpoint]:
        return [endpoint for listener in self._listeners for endpoint in listener.endpoints]

    def _addresses(self) -> tuple[Address, ...]:
        return addresses_to_announce(self._bound, self.announce, self.identity.peer)

    def _network_changed(self, gone: frozenset[str]) -> None:
        """This machine has other addresses than before."""
        found = self._addresses()
        # Without a network there is nobody to tell, and it may come back as it was.
        offline = loopback_only(_hosts(found)) and not loopback_only(_hosts(self._announced))
        if not self._closed and found != self._announced and not offline:
            self._announced = found
            self.on_addresses(found)

    def notes(self) -> Sequence[str]:
        if self._announced and loopback_only(_hosts(self._announced)):
            return [f"{SCHEME}: {loopback_note(endpoint.host for endpoint in self._bound)}"]
        return ()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _accepted(self, sock: socket.socket, reservation: Reservation) -> None:
        """Prove both ends in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._accept(sock, reservation))
        self._handshakes[task] = sock
        task.add_done_callback(self._accept_done)

    def _accept_done(self, task: asyncio.Task[None]) -> None:
        del self._handshakes[task]
        if not task.cancelled() and (exc := task.exception()):
            logger.error("accepting a connection failed", exc_info=exc)

    async def _accept(self, sock: socket.socket, reservation: Reservation) -> None:
        assert self._listener_context
        challenge = secrets.token_bytes(CHALLENGE_BYTES)

        def prove(connection: Connection, frame: FrameType, body: bytes) -> None:
            if frame is not FrameType.PROOF or connection.transport is None:
                raise ProtocolError(f"{frame.name} before the proof")
            channel = SecureChannel.of(connection.transport.get_extra_info("ssl_object"), self._certificate)
            connection.establish(*check_proof(body, challenge, self.identity.peer, channel))
            self._connections.connection_idle(connection)

        connection = Connection(self._connections, self.limits, prove, self._connections.accept_stream)
        connection.socket = reservation
        loop = asyncio.get_running_loop()
        seconds = self.limits.connect_timeout
        deadline = loop.time() + seconds
        try:
            await loop.connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=self._listener_context,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=RETIRE_SECONDS,
            )
            connection.write(encode_frame(FrameType.HELLO, make_hello(challenge, self._settings)))
            async with asyncio.timeout_at(deadline):
                await connection.established
        except (OSError, SwarmError) as exc:  # TimeoutError and ssl.SSLError are OSErrors
            logger.debug("refused an incoming connection: %r", exc)
        finally:
            if connection.remote is None and not connection.error:
                connection.fail(PeerUnreachableError("the dialler did not prove who it is"))
            if connection.error:
                reservation.release()

    # --- dialling -----------------------------------------------------------------------------------

    async def open_stream(self, address: Address) -> Stream:
        self._check_open()
        endpoint = endpoint_of(address)
        connection = self._connections.take_idle(address.peer) or await self._dial(endpoint, address.peer)
        return self._connections.open_stream(connection, address.peer)

    async def _dial(self, endpoint: Endpoint, peer: PeerId) -> Connection:
        def prove(connection: Connection, frame: FrameType, body: bytes) -> None:
            if frame is not FrameType.HELLO or connection.transport is None:
                raise ProtocolError(f"{frame.name} before the hello")
            tls: ssl.SSLObject = connection.transport.get_extra_info("ssl_object")
            certificate = tls.getpeercert(binary_form=True) or b""
            check_certificate(certificate, peer)
            channel = SecureChannel.of(tls, certificate)
            proof, theirs = answer_hello(body, self.identity, peer, channel, self._settings)
            connection.write(encode_frame(FrameType.PROOF, proof))
            connection.establish(peer, theirs)

        connection = Connection(self._connections, self.limits, prove)
        connection.socket = self.resources.reserve(peer, Resource.DESCRIPTORS)
        seconds = self.limits.connect_timeout
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(seconds) as deadline:
                self._dials.add(deadline)
                try:
                    sock = await connect(endpoint, seconds)
                    handshake = self._dial_tls(sock, connection)
                    await asyncio.wait([handshake])
                    handshake.result()
                    await connection.established
                    if connection.error:  # lost again before this task had its turn
                        raise PeerUnreachableError(connection.error.message)
                finally:
                    self._dials.discard(deadline)
            self._check_open()
        except TimeoutError as exc:
            self._check_open()
            raise PeerUnreachableError(
                f"{short(peer)} at {endpoint} did not answer within {seconds:g} s"
            ) from exc
        except ssl.SSLError as exc:
            raise PeerIdentityError(
                f"what answers at {endpoint} is not {short(peer)}: it does not speak TLS 1.3 ({exc.reason})"
            ) from exc
        except OSError as exc:
            reason = str(exc) or "it hung up during the handshake"  # event loops raise it without a text
            raise PeerUnreachableError(f"cannot reach {short(peer)} at {endpoint}: {reason}") from exc
        finally:
            if connection.remote is None or self._closed:
                connection.fail(PeerUnreachableError("the dial was given up"))
                connection.socket.release()
                if sock:
                    hang_up(sock)
        return connection

    def _dial_tls(self, sock: socket.socket, connection: Connection) -> asyncio.Task[None]:
        """Bring ``sock`` to TLS in a task of its own, which outlives a cancelled dial by a moment."""

        async def handshake() -> None:
            try:
                await loop.create_connection(
                    lambda: connection,
                    sock=sock,
                    ssl=self._dialler_context,
                    server_hostname="",
                    ssl_handshake_timeout=self.limits.connect_timeout,
                    ssl_shutdown_timeout=RETIRE_SECONDS,
                )
            except OSError:
                # Closed by now. When the very first write fails, uvloop forgets to tell the socket object,
                # which would later close whatever has the descriptor then.
                sock.detach()
                raise

        def done(task: asyncio.Task[None]) -> None:
            del self._handshakes[task]
            if not task.cancelled():
                task.exception()  # seen here: nobody may be waiting any more

        loop = asyncio.get_running_loop()
        task = loop.create_task(handshake())
        self._handshakes[task] = sock
        task.add_done_callback(done)
        return task

    # --- the end ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this transport is closed")

    async def close(self) -> None:
        self._closed = True
        await cancel_and_wait(self._watch)
        self._stop_listening()
        loop = asyncio.get_running_loop()
        for deadline in self._dials:
            deadline.reschedule(loop.time())
        for sock in self._handshakes.values():
            hang_up(sock)
        self._connections.begin_close()
        await self._connections.finish_close(self._handshakes)


def _hosts(addresses: Iterable[Address]) -> list[str]:
    return [endpoint_of(address).host for address in addresses]


def _has_input(connection: Connection) -> bool:
    """Whether an idle connection's socket has something to read, most likely its end."""
    if connection.transport is None or connection.transport.is_closing():
        return True
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
