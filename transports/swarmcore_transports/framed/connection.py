"""One connection, one stream at a time: frames in and out, the proof of both ends, signs of life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError, SwarmError
from swarmcore.printable import printable_line
from swarmcore.resources import Reservation
from swarmcore.transport import Buffer
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.frames import FrameReader, Kind, Settings, encode_frame

if TYPE_CHECKING:
    from swarmcore_transports.framed.migration import Move
    from swarmcore_transports.framed.stream import FramedStream

logger = logging.getLogger(__name__)

RETIRE_SECONDS = 2.0
"""How long the last words of a connection may take to leave before it is cut."""

_WRITE_HIGH_WATER = 512 * 1024
_MIN_HEARTBEAT = 0.05
_FASTEST_ASKED = 1.0
"""Seconds: the other side cannot have signs of life more often, on hundreds of connections."""
_MOST_HEARTBEATS = 128
"""Signs of life that may come between two ticks: honest peers send some, or what has piled up in a pause."""
_MAX_REASON = 200
_dropped = memoryview(bytearray(64 * 1024))  # where bytes go that nobody will look at


class Owner(Protocol):
    """Who is told what happens to a `Connection`."""

    def connection_made(self, connection: Connection) -> None:
        """It has TLS; nothing is proven yet."""

    def connection_idle(self, connection: Connection) -> None:
        """Both sides have closed the stream it carried."""

    def connection_lost(self, connection: Connection) -> None:
        """It is gone, or will be within seconds, and carries nothing any more."""

    def connection_resumes(self, connection: Connection, token: bytes) -> None:
        """The dialler wants the pipe of ``connection`` to carry the one of that ``token`` from now on."""


Greet = Callable[["Connection", Kind, bytes], None]
"""Takes the other side's handshake frame and calls `Connection.establish`; raises a SwarmError to refuse."""

OnOpen = Callable[["Connection"], None]


class Connection(asyncio.BufferedProtocol):
    """The protocol of one byte pipe, whose ends are proven by a handshake frame or were proven before.

    Nothing but one handshake frame is taken until `establish`; after that, frames go to the stream. A
    connection always reads: memory is bounded by the credit each stream grants, never by a full socket.
    """

    def __init__(self, owner: Owner, limits: Limits, greet: Greet, on_open: OnOpen | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._greet = greet
        self._on_open = on_open
        self._keepalive = limits.keepalive
        self._reader = FrameReader(self, limits.max_message)
        self._writing_paused = False
        self._heard = True
        self._silent_ticks = 0
        self._heartbeats = 0
        self._spoke = True
        self._garbled = False
        self._interval = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._dismissal: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.socket: Reservation | None = None
        """The file descriptor that this connection has for itself, for an unproven peer until `establish`."""
        self.established: asyncio.Future[None] = self._loop.create_future()
        """Done when both ids are proven; fails with the reason when they are not."""
        self.remote: PeerId | None = None
        self.settings = Settings.of(limits)
        self.token = b""
        """By which both ends know this connection when it is moved to another pipe; empty if it cannot be."""
        self.move: Move | None = None
        self.resumed: asyncio.Future[None] = self._loop.create_future()
        """Done when the listener agrees to a ``RESUME`` sent here."""
        self.stream: FramedStream | None = None
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
        """Both ids are proven: streams may open, signs of life begin.

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
        """Say why and let go: the other side drops the connection once it has read that, or is cut off.

        Until then, at most ``patience`` seconds (`RETIRE_SECONDS`), what comes in is read and dropped: a
        socket closed with unread data would be reset, and the last words lost.
        """
        if self.error is None:
            self.write(encode_frame(Kind.ABORT, reason[:_MAX_REASON].encode()))
            self._end(error or ConnectionLostError(reason))
            # Whoever has not proven a peer id is not worth a socket for so long.
            patience = RETIRE_SECONDS if patience is None else patience
            self._timer = self._loop.call_later(patience if self.remote else 0.0, self._cut)

    def dismiss(self) -> None:
        """Ask the dialler to drop this idle connection.

        Simply to retire it would break a stream that the dialler opens at the same moment.
        """
        self.write(encode_frame(Kind.DISMISS))
        self._dismissal = self._loop.call_later(RETIRE_SECONDS, self.retire, "the connection was idle")

    def fail(self, error: SwarmError) -> None:
        """Cut the connection at once; what uses it raises ``error``."""
        self._end(error)
        self._cut()

    def _end(self, error: SwarmError) -> None:
        if self.error is not None:
            return
        self.error = error
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._keep()
        if self._reader.under_way:  # nobody waits for it, and this object may be around for a while
            self._garbled = True
            self._reader.forget()
        if not self.established.done():
            self.established.set_exception(error)
            self.established.exception()  # seen here: nobody may be waiting any more
        if not self.resumed.done():
            self.resumed.set_exception(error)
            self.resumed.exception()
        stream, self.stream = self.stream, None
        if stream:
            stream.connection_lost(error)

    def _cut(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.move:
            self.move.give_up()
            self.move = None
        elif self.transport:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(_lost(exc, self.remote))
        self._cut()
        self._owner.connection_lost(self)

    def eof_received(self) -> None:
        self._end(_lost(None, self.remote))

    # --- signs of life ------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Twice in the shorter of both sides' keep-alive times.

        A side that has sent nothing since the last tick sends a heartbeat, unasked, so that it is heard even
        where the way to it is full. Ticks are counted, not seconds, so that a process that was stopped itself
        does not take the pause for the other side's silence.
        """
        if self._heard:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
            if self._silent_ticks * self._interval >= 3 * self._keepalive:
                seconds = self._silent_ticks * self._interval
                self.fail(ConnectionLostError(f"{self._name()} has been silent for {seconds:.1f} s"))
                return
        if self._stalled():
            self.retire("a message came too slowly, or not to its end")
            return
        if not self._spoke and not self._writing_paused:
            self.write(encode_frame(Kind.HEARTBEAT))
        self._heard = self._spoke = False
        self._heartbeats = 0
        self._timer = self._loop.call_later(self._interval, self._tick)

    def _stalled(self) -> bool:
        under_way = self._reader.under_way
        if under_way is None or self.stream is None:
            return False
        announced = self._reader.part_is_missing
        return self.stream.stalled(self._loop.time(), *under_way, announced=announced)

    @property
    def silent_for(self) -> float:
        """Seconds without a word from the other side; one that lives speaks in every keep-alive time."""
        return self._silent_ticks * self._interval

    def _name(self) -> str:
        return f"peer {short(self.remote)}" if self.remote else "the peer"

    # --- out ----------------------------------------------------------------------------------------

    @property
    def accepts(self) -> bool:
        """Whether this is the listener's end, on which streams are opened from afar."""
        return self._on_open is not None

    @property
    def writable(self) -> bool:
        """False while the socket is behind; the stream's `wake` is called when that ends."""
        return not self._writing_paused

    def write(self, *buffers: Buffer) -> None:
        """Send bytes of frames. They are encrypted before this returns, so the buffers may be reused."""
        self._spoke = True
        if self.transport and not self.transport.is_closing():
            self.transport.writelines(buffers)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self.stream:
            self.stream.wake()

    # --- in -----------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return _dropped if self._garbled else self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = True
        if self._garbled:
            return
        try:
            self._reader.received(nbytes)
        except SwarmError as exc:
            self._garbled = True
            if self.error is None:
                logger.info("dropping the connection of %s: %s", self._name(), exc)
                self.retire(exc.message, exc)

    def frame_received(self, kind: Kind, value: int, body: bytes) -> None:
        if self.error is not None:
            if (
                kind is Kind.ABORT
            ):  # both have retired it, and neither is interested in the other's last words
                self._cut()
        elif kind is Kind.ABORT:
            self._aborted(printable_line(body.decode(errors="replace"), _MAX_REASON))
        elif self.remote is None:
            self._greet(self, kind, body)
        elif kind is Kind.HEARTBEAT:
            self._heartbeats += 1
            if self._heartbeats > _MOST_HEARTBEATS:
                raise ProtocolError("the peer floods this one with signs of life")
        elif kind is Kind.OPEN:
            if self.stream or not self._on_open:
                raise ProtocolError("a stream was opened out of turn")
            self._on_open(self)
        elif kind is Kind.MOVE and self.move:
            self.move.old_pipe_ended()
        elif kind is Kind.RESUME and self.stream is None:
            if self.accepts:
                self._owner.connection_resumes(self, body)
            elif not self.resumed.done():
                self.resumed.set_result(None)
        elif kind is Kind.DISMISS and not self.accepts:
            if self.stream is None:
                self.fail(ConnectionLostError(f"{self._name()} wants no idle connection"))
        elif self.stream:
            self.stream.frame_received(kind, value)
        else:
            raise ProtocolError(f"{kind.name} outside a stream")

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

    # --- changing the pipe --------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """How the bytes travel, as in `Stream.path`."""
        return str(self.transport.get_extra_info("path", "direct")) if self.transport else "direct"

    def path_changed(self) -> None:
        """The pipe is the same, and its bytes travel another way."""
        if self.stream:
            self.stream.path = self.path

    def release(self) -> asyncio.Transport:
        """Give the pipe away, to carry another connection; this one is over."""
        pipe, self.transport = self.transport, None
        assert pipe
        self._end(ConnectionLostError("the connection gave its pipe to another one"))
        self._owner.connection_lost(self)
        return pipe

    def switch_to(self, pipe: asyncio.Transport) -> None:
        """Write to ``pipe`` from now on."""
        self.transport = pipe
        pipe.set_protocol(self)
        pipe.set_write_buffer_limits(_WRITE_HIGH_WATER)
        self._writing_paused = False
        self.path_changed()
        if self.stream:
            self.stream.wake()

    # --- streams ------------------------------------------------------------------------------------

    def carry(self, stream: FramedStream) -> None:
        """From now on this connection carries ``stream``."""
        self.stream = stream
        self._keep()

    def _keep(self) -> None:
        if self._dismissal:
            self._dismissal.cancel()
            self._dismissal = None

    def stream_closed(self) -> None:
        """Called by the stream when both sides have closed it."""
        if self.stream:
            self.stream.over()
        self.stream = None
        self._owner.connection_idle(self)


def _lost(exc: Exception | None, remote: PeerId | None) -> SwarmError:
    peer = f"peer {short(remote)}" if remote else "the peer"
    error: SwarmError
    if remote is None:
        error = PeerUnreachableError(f"{peer} closed the connection during the handshake")
    else:
        error = ConnectionLostError(f"the connection to {peer} broke" + (f": {exc}" if exc else ""))
    error.__cause__ = exc
    return error
