"""What the transport needs of a WebRTC implementation, and aiortc as the one that everybody has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidStateError
from aiortc.rtcconfiguration import RTCBundlePolicy, RTCIceTransportPolicy

from swarmcore.errors import ConnectionLostError, ProtocolError, SwarmError
from swarmcore_transports.webrtc.candidates import CandidatePair, path_of
from swarmcore_transports.webrtc.descriptions import check_description, without_names
from swarmcore_transports.webrtc.ice import IceServer
from swarmcore_transports.webrtc.sctp import quick_data_channels

logger = logging.getLogger(__name__)

CHANNEL_LABEL = "/swarmcore/stream/1"
"""The label of data channels that carry our framed streams."""


_MOST_EARLY = 64
"""Messages that may come on a channel before it is used: a peer's hello, and what goes with it."""


class ChannelUser(Protocol):
    """Who is told what happens on a `DataChannel`, in the event loop."""

    def message_received(self, data: bytes) -> None: ...

    def queue_low(self) -> None: ...

    def channel_closed(self) -> None: ...


class DataChannel(ABC):
    """An ordered, reliable data channel. What comes before it is used waits for `use`."""

    def __init__(self) -> None:
        self._user: ChannelUser | None = None
        self._early: list[bytes] = []
        self._closed = False

    def use(self, user: ChannelUser) -> None:
        """From now on ``user`` is told; first of what has come already."""
        self._user = user
        for data in self._early:
            user.message_received(data)
        self._early.clear()
        if self._closed:
            user.channel_closed()

    def _message(self, data: bytes) -> None:
        """For engines: a message has come."""
        if self._user:
            self._user.message_received(data)
        elif len(self._early) < _MOST_EARLY:
            self._early.append(data)
        else:
            self.close()

    def _low(self) -> None:
        """For engines: `queued` has fallen to what `set_low` said."""
        if self._user:
            self._user.queue_low()

    def _ended(self) -> None:
        """For engines: the channel is closed."""
        self._closed = True
        if self._user:
            self._user.channel_closed()

    @property
    @abstractmethod
    def queued(self) -> int:
        """Bytes that were sent and have not left yet."""

    @abstractmethod
    def set_low(self, amount: int) -> None:
        """Have the user told whenever `queued` falls to ``amount``."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Queue ``data``; nothing happens when the channel is closed."""

    @abstractmethod
    def close(self) -> None:
        """Harmless when repeated."""


class PeerConnection(ABC):
    """One connection to one peer, over which channels are opened by either side."""

    def __init__(self) -> None:
        self.on_channel: Callable[[DataChannel], None] = lambda channel: None
        self.on_lost: Callable[[str], None] = lambda reason: None

    @abstractmethod
    async def offer(self) -> str:
        """The SDP to send to the other side."""

    @abstractmethod
    async def answer(self, offer: str) -> str:
        """The SDP to send back. Raise `ProtocolError` when ``offer`` is none."""

    @abstractmethod
    async def accept(self, answer: str) -> None:
        """Begin to connect. Raise `ProtocolError` when ``answer`` is none."""

    @abstractmethod
    async def connected(self) -> None:
        """Wait until it is. Raise `ConnectionLostError` when it cannot be."""

    @abstractmethod
    async def open_channel(self) -> DataChannel:
        """A new channel, open. Raise `ConnectionLostError` when the connection is gone."""

    @property
    @abstractmethod
    def path(self) -> str:
        """As `Stream.path`: direct, hole-punched or relayed (by a TURN server). Known once connected."""

    @abstractmethod
    async def close(self) -> None:
        """Harmless when repeated."""


class AiortcChannel(DataChannel):
    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel
        channel.on("message", self._received)
        channel.on("bufferedamountlow", self._low)
        channel.on("close", self._ended)

    def _received(self, data: bytes | str) -> None:
        if isinstance(data, bytes):
            self._message(data)
        else:  # nothing that our streams send
            logger.debug("a channel was closed on which text came")
            self.close()
            self._ended()

    @property
    def queued(self) -> int:
        return int(self._channel.bufferedAmount)

    def set_low(self, amount: int) -> None:
        self._channel.bufferedAmountLowThreshold = amount

    def send(self, data: bytes) -> None:
        with contextlib.suppress(InvalidStateError):
            self._channel.send(data)

    def close(self) -> None:
        self._channel.close()


class AiortcConnection(PeerConnection):
    """`RTCPeerConnection` of aiortc."""

    def __init__(self, ice: Sequence[IceServer], *, relay_only: bool = False) -> None:
        """``ice`` are at most one STUN and one TURN server: aiortc uses no more."""
        super().__init__()
        servers = [RTCIceServer(one.url, one.user, one.password) for one in ice]
        policy = RTCIceTransportPolicy.RELAY if relay_only else RTCIceTransportPolicy.ALL
        self._connection = RTCPeerConnection(
            RTCConfiguration(
                iceServers=servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE, iceTransportPolicy=policy
            )
        )
        self._path = "direct"
        self._connection.on("datachannel", self._arrived)
        self._connection.on("connectionstatechange", self._state_changed)
        loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] | None = None
        self._connected: asyncio.Future[None] = loop.create_future()
        # Agreed on by both sides without a word: an offer needs one channel, and this one is open at once.
        with quick_data_channels():
            self._first = self._connection.createDataChannel("swarmcore", negotiated=True, id=0)
        # Not from inside: aiortc closes one channel after the other, and must not find one closed meanwhile.
        self._first.on("close", lambda: loop.call_soon(lambda: self.on_lost("the peer has ended it")))

    def _arrived(self, channel: Any) -> None:
        self.on_channel(AiortcChannel(channel))

    def _state_changed(self) -> None:
        state = self._connection.connectionState
        if state == "connected" and not self._connected.done():
            self._path = path_of(self._nominated())
            self._connected.set_result(None)
        elif state in ("failed", "closed"):
            reason = "no path to it was found" if not self._connected.done() else "the connection broke"
            if not self._connected.done():
                self._connected.set_exception(ConnectionLostError(reason))
                self._connected.exception()
            self.on_lost(reason)

    async def offer(self) -> str:
        await self._connection.setLocalDescription(await self._connection.createOffer())
        return str(self._connection.localDescription.sdp)

    async def answer(self, offer: str) -> str:
        await self._take(offer, "offer")
        await self._connection.setLocalDescription(await self._connection.createAnswer())
        return str(self._connection.localDescription.sdp)

    async def accept(self, answer: str) -> None:
        await self._take(answer, "answer")

    async def _take(self, sdp: str, kind: str) -> None:
        check_description(sdp)
        try:
            await self._connection.setRemoteDescription(RTCSessionDescription(without_names(sdp), kind))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, InvalidStateError) as exc:
            raise ProtocolError(f"the peer sent an {kind} that cannot be read: {exc!r}") from exc

    async def connected(self) -> None:
        await asyncio.shield(self._connected)

    async def open_channel(self) -> DataChannel:
        try:
            channel = self._connection.createDataChannel(CHANNEL_LABEL)
        except InvalidStateError as exc:
            raise ConnectionLostError("the connection is closed") from exc
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: SwarmError | None) -> None:
            if not opened.done():
                opened.set_exception(error) if error else opened.set_result(None)

        channel.on("open", lambda: settle(None))
        channel.on("close", lambda: settle(ConnectionLostError("the connection was closed")))
        usable = AiortcChannel(channel)  # before it opens: what the peer says first must not be missed
        try:
            if channel.readyState != "open":
                await opened
        except BaseException:
            channel.close()
            raise
        return usable

    @property
    def path(self) -> str:
        return self._path

    def _nominated(self) -> CandidatePair | None:
        """Of aioice, which aiortc does not show; gone once the connection is closed."""
        sctp = self._connection.sctp
        return sctp.transport.transport._connection._nominated.get(1) if sctp else None

    async def close(self) -> None:
        if self._closing is None:  # aiortc fails when it is asked twice
            self._closing = asyncio.ensure_future(self._connection.close())
        await asyncio.shield(self._closing)
