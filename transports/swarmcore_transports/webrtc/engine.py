"""What the transport needs of a WebRTC implementation, and the choice of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from swarmcore.errors import InputError
from swarmcore.plugins import PluginGroup
from swarmcore_transports.webrtc.ice import IceServer

CHANNEL_LABEL = "/swarmcore/stream/1"
"""The label of data channels that carry our framed streams."""

_MAX_EARLY = 64
"""Messages that may come on a channel before it is used: a peer's hello, and what goes with it."""


class ChannelHandler(Protocol):
    """Who is told what happens on a `DataChannel`, in the event loop."""

    def message_received(self, data: bytes) -> None: ...

    def buffered_amount_low(self) -> None: ...

    def channel_closed(self) -> None: ...


class DataChannel(ABC):
    """An ordered, reliable data channel. What comes before it is used waits for `set_handler`."""

    def __init__(self) -> None:
        self._handler: ChannelHandler | None = None
        self._early: list[bytes] = []
        self._closed = False

    def set_handler(self, handler: ChannelHandler) -> None:
        """From now on ``handler`` is told; first of what has come already."""
        self._handler = handler
        for data in self._early:
            handler.message_received(data)
        self._early.clear()
        if self._closed:
            handler.channel_closed()

    def _message(self, data: bytes) -> None:
        """For engines: a message has come."""
        if self._handler:
            self._handler.message_received(data)
        elif len(self._early) < _MAX_EARLY:
            self._early.append(data)
        else:
            self.close()

    def _low(self) -> None:
        """For engines: `buffered_amount` has fallen to what `set_low_threshold` said."""
        if self._handler:
            self._handler.buffered_amount_low()

    def _ended(self) -> None:
        """For engines: the channel is closed."""
        self._closed = True
        if self._handler:
            self._handler.channel_closed()

    @property
    @abstractmethod
    def buffered_amount(self) -> int:
        """Bytes that were sent and have not left yet."""

    @abstractmethod
    def set_low_threshold(self, amount: int) -> None:
        """Have the handler told whenever `buffered_amount` falls to ``amount``."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Queue ``data``; nothing happens when the channel is closed."""

    @abstractmethod
    def close(self) -> None:
        """Harmless when repeated."""


class PeerConnection(ABC):
    """One connection to one peer, over which channels are opened by either side.

    The side that dials makes the offer, and it alone begins restarts. Made within a running event loop;
    ``ice`` are at most one STUN and one TURN server. With ``relay_only`` no address of this side but those of
    the TURN server is named to the peer.
    """

    def __init__(self, ice: Sequence[IceServer], *, relay_only: bool = False) -> None:
        self.on_channel: Callable[[DataChannel], None] = lambda channel: None
        """The peer has opened a channel."""
        self.on_lost: Callable[[str], None] = lambda reason: None
        """The connection is gone for good. May be called more than once."""
        self.on_unanswered: Callable[[], None] = lambda: None
        """`unanswered` has become true."""
        self.on_path_changed: Callable[[], None] = lambda: None
        """Another path is used than before."""
        self.on_candidate: Callable[[str], None] = lambda candidate: None
        """Called with each candidate of ours that the latest description does not name, in SDP's notation
        (``candidate:…``) with the ``ufrag`` it belongs to, and with ``""`` when there are no more. Never
        before that description was returned."""

    @property
    @abstractmethod
    def signalling_channel(self) -> DataChannel:
        """The channel that both sides have from the start: number 0, negotiated out of band."""

    @abstractmethod
    async def offer(self) -> str:
        """The SDP to send to the other side, with the candidates that are known at once."""

    @abstractmethod
    async def answer(self, offer: str) -> str:
        """The SDP to send back, for a first offer or for one that restarts ICE.

        Raise `ProtocolError` when ``offer`` is none, or ends what it should restart.
        """

    @abstractmethod
    async def accept(self, answer: str) -> None:
        """Begin to connect, or to connect anew. Raise `ProtocolError` when ``answer`` is none."""

    @abstractmethod
    async def restart(self) -> str:
        """An offer that restarts ICE: new candidates, from the addresses that this machine has now.

        Channels and what is under way on them stay; until `accept` has found a new path, the old one is used.
        An engine may stay with the old one for as long as that works.
        Raise `ConnectionLostError` when the connection is gone.
        """

    @abstractmethod
    async def add_candidate(self, candidate: str) -> None:
        """One more of the peer's, as its ``on_candidate`` had it. What cannot be read, or belongs to an
        earlier description, is ignored."""

    @abstractmethod
    async def connected(self) -> None:
        """Wait until it is, for the first time. Raise `ConnectionLostError` when it cannot be."""

    @abstractmethod
    async def open_channel(self) -> DataChannel:
        """A new channel, open. Raise `ConnectionLostError` when the connection is gone."""

    @property
    @abstractmethod
    def unanswered(self) -> bool:
        """Whether the peer's side acknowledges nothing any more: for a second or longer, and until it does.
        What the peer's program makes of it is another matter. Never of a connection without traffic."""

    def probe_peer(self) -> None:  # noqa: B027 - most do so by themselves, and in their own time
        """There is reason to think that the peer is gone: find out now."""

    @property
    @abstractmethod
    def path(self) -> str:
        """As `Stream.path`: direct, hole-punched or relayed (by a TURN server). Known once connected."""

    @abstractmethod
    async def close(self) -> None:
        """Harmless when repeated."""


ENGINES = PluginGroup("WebRTC engine", "swarmcore.webrtc_engines")
"""The WebRTC implementations that are installed; each entry point names a class of `PeerConnection`."""


def connection_class(engine: str = "auto") -> type[PeerConnection]:
    """The class that is installed as ``engine``; for ``"auto"`` that of aiortc.

    Raise `InputError` when there is none, and `MissingExtraError` when a library that it needs is missing.
    """
    found = ENGINES.load("aiortc" if engine == "auto" else engine)
    if not (isinstance(found, type) and issubclass(found, PeerConnection)):
        raise InputError(f"WebRTC engine {engine!r} is {found!r}, which is no class of PeerConnection")
    return found
