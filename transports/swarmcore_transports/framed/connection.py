"""One connection, one stream at a time: frames in and out, the proof of both ends, heartbeats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError, SwarmError
from swarmcore.printable import printable_line
from swarmcore.resources import Reservation
from swarmcore.transport import Buffer
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.frames import FrameReader, FrameType, Settings, encode_frame

logger = logging.getLogger(__name__)

RETIRE_SECONDS = 2.0
"""How long the last frame of a connection may take to leave before it is cut."""

_WRITE_HIGH_WATER = 512 * 1024
_MIN_HEARTBEAT = 0.05
_FASTEST_ASKED = 1.0
"""Seconds: the other side cannot ask for heartbeats more often, on hundreds of connections."""
_MAX_HEARTBEATS = 128
"""Heartbeats that may come between two ticks: honest peers send some, or what has piled up in a pause."""
_MAX_REASON = 200
_discarded = memoryview(bytearray(64 * 1024))  # where bytes go that nobody will look at


class ConnectionOwner(Protocol):
    """Who is told what happens to a `Connection`."""

    def connection_made(self, connection: Connection) -> None:
        """It has a byte transport; nothing is proven yet."""

    def connection_idle(self, connection: Connection) -> None:
        """Both sides have closed the stream it carried."""

    def connection_lost(self, connection: Connection) -> None:
        """It is gone, or will be within seconds, and carries nothing any more."""

    def migration_requested(self, connection: Connection, token: bytes) -> None:
        """The dialler wants this one's byte transport to carry the connection of that ``token``."""


class CarriedStream(Protocol):
    """What a `Connection` tells the stream that it carries."""

    path: str

    def frame_received(self, frame: FrameType, value: int) -> None: ...

    def part_announced(self, length: int, *, total: int | None) -> None: ...

    def message_received(self, message: memoryview) -> None: ...

    def stalled(self, now: float, message: int, got: int, *, announced: bool) -> bool: ...

    def wake(self) -> None: ...

    def aborted(self, reason: str) -> None: ...

    def connection_lost(self, error: SwarmError) -> None: ...

    def detached(self) -> None: ...


class ConnectionMigration(Protocol):
    """What a `Connection` tells its migration to another byte transport."""

    def peer_switched(self) -> None: ...

    def abort(self) -> None: ...


HandshakeHandler = Callable[["Connection", FrameType, bytes], None]
"""Takes the other side's handshake frame and calls `Connection.establish`; raises a SwarmError to refuse."""


class Connection(asyncio.BufferedProtocol):
    """The protocol of one byte transport, whose ends are proven by a handshake frame or were proven before.

    Nothing but one handshake frame is taken until `establish`; after that, frames go to the stream. A
    connection always reads: memory is bounded by the credit each stream grants, never by a full socket, so
    that a stream whose application does not read cannot hold back heartbeats, credit or the end.
    """

    def __init__(
        self,
        owner: ConnectionOwner,
        limits: Limits,
        on_handshake: HandshakeHandler,
        on_open: Callable[[Connection], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._on_handshake = on_handshake
        self._on_open = on_open
        self.accepts = on_open is not None
        """Whether this is the listener's end, on which streams are opened from afar."""
        self._keepalive = limits.keepalive
        self._reader = FrameReader(self, limits.max_message)
        self._received_since_tick = self._sent_since_tick = True
        self._silent_ticks = 0
        self._heartbeats = 0
        self._discarding = False  # what comes in is no longer looked at
        self._interval = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._dismissal: asyncio.TimerHandle | None = None
        self.writable = True
        """False while the socket is behind; the stream's `wake` is called when that ends."""
        self.transport: asyncio.Transport | None = None
        self.socket: Reservation | None = None
        """The file descriptor that this connection has for itself, for an unproven peer until `establish`."""
        self.established: asyncio.Future[None] = self._loop.create_future()
        """Done when both ids are proven; fails with the reason when they are not."""
        self.remote: PeerId | None = None
        self.settings = Settings.of(limits)
        self.token = b""
        """By which both ends know this connection when it migrates to another transport; empty: it cannot."""
        self.migration: ConnectionMigration | None = None
        self.resumed: asyncio.Future[None] = self._loop.create_future()
        """Done when the listener agrees to a ``RESUME`` sent here."""
        self.stream: CarriedStream | None = None
        self.error: SwarmError | None = None
        """Why the connection can no longer be used; None while it can."""

    def __repr__(self) -> str:
        state = "lost" if self.error else "busy" if self.stream else "idle" if self.remote else "handshake"
        return f"<Connection {short(self.remote) if self.remote else '?'} {state}>"

    # --- life ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, as other event loops' transports (uvloop's) are no subclasses of asyncio's.
        self.transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(_WRITE_HIGH_WATER)
        self._owner.connection_made(self)
        if self.error:
            transport.abort()

    def establish(self, remote: PeerId, theirs: Settings) -> None:
        """Both ids are proven: streams may open, heartbeats begin.

        Raise `ResourceLimitError` when the peer has too many connections already.
        """
        if self.socket:
            self.socket.prove(remote)
        self.remote = remote
        self.settings = theirs
        asked = max(theirs.heartbeat, _FASTEST_ASKED)
        self._interval = max(min(self._keepalive, asked), _MIN_HEARTBEAT) / 2
        self._timer = self._loop.call_later(self._interval, self._tick)
        if not self.established.done():
            self.established.set_result(None)

    def retire(self, reason: str, error: SwarmError | None = None, *, patience: float | None = None) -> None:
        """Say why and wait: the other side drops the connection once it has read that, or is cut off.

        Until then, at most ``patience`` seconds (`RETIRE_SECONDS`), what comes in is read and dropped: a
        socket closed with unread data would be reset (RFC 1122, 4.2.2.13), and the last frame lost.
        """
        if self.error is None:
            self.write(encode_frame(FrameType.ABORT, reason[:_MAX_REASON].encode()))
            self._end(error or ConnectionLostError(reason))
            # Whoever has not proven a peer id is not worth a socket for so long.
            patience = RETIRE_SECONDS if patience is None else patience
            self._timer = self._loop.call_later(patience if self.remote else 0.0, self._cut)

    def dismiss(self) -> None:
        """Ask the dialler to drop this idle connection.

        Simply to retire it would break a stream that the dialler opens at the same moment.
        """
        self.write(encode_frame(FrameType.DISMISS))
        self._dismissal = self._loop.call_later(RETIRE_SECONDS, self.retire, "the connection was idle")

    def fail(self, error: SwarmError) -> None:
        """Cut the connection at once; what uses it raises ``error``."""
        self._end(error)
        self._cut()

    def _end(self, error: SwarmError) -> None:
        if self.error is not None:
            return
        self.error = error
        self._cancel_timer()
        self._cancel_dismissal()
        if self._reader.partial_message:  # nobody waits for it, and this object may be around for a while
            self._discarding = True
            self._reader.forget()
        for waiting in (self.established, self.resumed):
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # seen here: nobody may be waiting any more
        stream, self.stream = self.stream, None
        if stream:
            stream.connection_lost(error)

    def _cut(self) -> None:
        self._cancel_timer()
        if self.migration:
            self.migration.abort()
            self.migration = None
        elif self.transport:
            self.transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _cancel_dismissal(self) -> None:
        if self._dismissal:
            self._dismissal.cancel()
            self._dismissal = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(self._lost(exc))
        self._cut()
        self._owner.connection_lost(self)
        self.transport = None  # asyncio's TLS goes on to hold its protocol, which is this

    def eof_received(self) -> None:
        self._end(self._lost(None))

    def _lost(self, exc: Exception | None) -> SwarmError:
        error: SwarmError
        if self.remote is None:
            error = PeerUnreachableError("the peer closed the connection during the handshake")
        else:
            reason = f": {exc}" if exc else ""
            error = ConnectionLostError(f"the connection to {self._name()} broke{reason}")
        error.__cause__ = exc
        return error

    def _name(self) -> str:
        return f"peer {short(self.remote)}" if self.remote else "the peer"

    # --- heartbeats ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Twice in the shorter of both sides' keep-alive times.

        A side that has sent nothing since the last tick sends a heartbeat, unasked: an answer to a ping would
        come late where the way to the peer is full. Ticks are counted, not seconds, so that a process that
        was stopped itself does not take the pause for the other side's silence.
        """
        if self._received_since_tick:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
            if self.silent_for >= 3 * self._keepalive:
                self.fail(ConnectionLostError(f"{self._name()} has been silent for {self.silent_for:.1f} s"))
                return
        partial = self._reader.partial_message
        if (
            partial
            and self.stream
            and self.stream.stalled(self._loop.time(), *partial, announced=self._reader.part_is_missing)
        ):
            self.retire("a message came too slowly, or not to its end")
            return
        if not self._sent_since_tick and self.writable:
            self.write(encode_frame(FrameType.HEARTBEAT))
        self._received_since_tick = self._sent_since_tick = False
        self._heartbeats = 0
        self._timer = self._loop.call_later(self._interval, self._tick)

    @property
    def silent_for(self) -> float:
        """Seconds without a byte from the other side; one that lives sends some in every keep-alive time."""
        return self._silent_ticks * self._interval

    # --- out ----------------------------------------------------------------------------------------

    def write(self, *buffers: Buffer) -> None:
        """Send bytes of frames. They are encrypted before this returns, so the buffers may be reused."""
        self._sent_since_tick = True
        if self.transport and not self.transport.is_closing():
            self.transport.writelines(buffers)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.stream:
            self.stream.wake()

    # --- in -----------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return _discarded if self._discarding else self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._received_since_tick = True
        if self._discarding:
            return
        try:
            self._reader.received(nbytes)
        except SwarmError as exc:
            self._discarding = True
            if self.error is None:
                logger.info("dropping the connection of %s: %s", self._name(), exc)
                self.retire(exc.message, exc)

    def frame_received(self, frame: FrameType, value: int, body: bytes) -> None:
        if self.error is not None:
            if frame is FrameType.ABORT:  # both sides have retired it: neither waits for the other's reason
                self._cut()
        elif frame is FrameType.ABORT:
            self._aborted(printable_line(body.decode(errors="replace"), _MAX_REASON))
        elif self.remote is None:
            self._on_handshake(self, frame, body)
        elif frame is FrameType.HEARTBEAT:
            self._heartbeats += 1
            if self._heartbeats > _MAX_HEARTBEATS:
                raise ProtocolError("the peer floods this one with heartbeats")
        elif frame is FrameType.OPEN:
            if self.stream or not self._on_open:
                raise ProtocolError("a stream was opened out of turn")
            self._on_open(self)
        elif frame is FrameType.MOVE and self.migration:
            self.migration.peer_switched()
        elif frame is FrameType.RESUME and self.stream is None:
            if self.accepts:
                self._owner.migration_requested(self, body)
            elif not self.resumed.done():
                self.resumed.set_result(None)
        elif frame is FrameType.DISMISS and not self.accepts:
            if self.stream is None:
                self.fail(ConnectionLostError(f"{self._name()} wants no idle connection"))
        elif self.stream:
            self.stream.frame_received(frame, value)
        else:
            raise ProtocolError(f"{frame.name} outside a stream")

    def part_announced(self, length: int, *, total: int | None) -> None:
        if self.stream:
            self.stream.part_announced(length, total=total)
        elif self.error is None:
            raise ProtocolError("a message outside a stream")

    def message_received(self, message: memoryview) -> None:
        if self.stream:
            self.stream.message_received(message)

    def _aborted(self, reason: str) -> None:
        if self.stream:
            self.stream.aborted(reason)
        if self.remote is None:
            self.fail(PeerUnreachableError(f"the peer refused the connection: {reason}"))
        else:
            self.fail(ConnectionLostError(f"{self._name()} dropped the connection: {reason}"))

    # --- another byte transport ---------------------------------------------------------------------

    @property
    def path(self) -> str:
        """How the bytes travel, as in `Stream.path`."""
        return str(self.transport.get_extra_info("path", "direct")) if self.transport else "direct"

    def path_changed(self) -> None:
        """The transport is the same, and its bytes travel by another path."""
        if self.stream:
            self.stream.path = self.path

    def give_up_transport(self) -> asyncio.Transport:
        """The transport, which is to carry another connection; this one is over."""
        transport, self.transport = self.transport, None
        assert transport
        self._end(ConnectionLostError("the connection gave its transport to another one"))
        self._owner.connection_lost(self)
        return transport

    def switch_to(self, transport: asyncio.Transport) -> None:
        """Write to ``transport`` from now on."""
        self.transport = transport
        transport.set_protocol(self)
        transport.set_write_buffer_limits(_WRITE_HIGH_WATER)
        self.path_changed()
        self.resume_writing()

    # --- streams ------------------------------------------------------------------------------------

    def attach(self, stream: CarriedStream) -> None:
        """From now on this connection carries ``stream``."""
        self.stream = stream
        self._cancel_dismissal()

    def stream_closed(self) -> None:
        """Called by the stream when both sides have closed it."""
        if self.stream:
            self.stream.detached()
        self.stream = None
        self._owner.connection_idle(self)
