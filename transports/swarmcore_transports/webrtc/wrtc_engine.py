"""Connections of libwebrtc, the implementation of WebRTC in Chrome, by the package wrtc."""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

import attrs
import webrtc

from swarmcore.errors import ConnectionLostError, ProtocolError
from swarmcore_transports.own_addresses import own_networks
from swarmcore_transports.webrtc.engine import CHANNEL_LABEL, DataChannel, PeerConnection
from swarmcore_transports.webrtc.ice import IceServer
from swarmcore_transports.webrtc.sdp import (
    Candidate,
    attribute,
    check_description,
    check_restart,
    is_usable,
    path_of,
    username_of,
    with_usable_candidates,
)
from swarmcore_transports.webrtc.wrtc_channel import WrtcChannel

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GATHER_SECONDS = 0.02
"""How long a description waits for candidates: those of own addresses take a few milliseconds."""

_MID = "0"
"""What every implementation calls the first media section, of which we have but one."""


@attrs.define
class _Candidate:
    type: str
    host: str


@attrs.define
class _Pair:
    local_candidate: Candidate
    remote_candidate: Candidate


class WrtcConnection(PeerConnection):
    """`RTCPeerConnection` of wrtc. Its events come in the event loop; its own threads carry the bytes."""

    def __init__(self, ice: Sequence[IceServer], *, relay_only: bool = False) -> None:
        super().__init__(ice, relay_only=relay_only)
        _allow_loopback_if_alone()
        self._connection = webrtc.RTCPeerConnection(
            webrtc.RTCConfiguration(
                ice_servers=[webrtc.RTCIceServer(one.url, one.user, one.password) for one in ice],
                ice_transport_policy="relay" if relay_only else "all",
                bundle_policy="max-bundle",
            )
        )
        self._loop = asyncio.get_running_loop()
        self._path = "direct"
        self._closed = False
        self._lost: str | None = None
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._channels: weakref.WeakSet[WrtcChannel] = weakref.WeakSet()
        self._ufrag = ""
        self._found: list[str] = []
        self._returned = False  # the latest description was
        self._gathered = asyncio.Event()
        self._remote = ""
        self._ice: webrtc.RTCIceTransport | None = None
        on = self._connection.on
        on("icecandidate", self._candidate_found)
        on("connectionstatechange", lambda event: self._state_changed())
        on("datachannel", lambda event: self.on_channel(self._watched(event.channel)))
        negotiated = webrtc.RTCDataChannelInit(negotiated=True, id=0)
        first = self._connection.create_data_channel("swarmcore", negotiated)
        first.on("close", lambda event: self._has_lost("the peer has ended it"))
        self._signals = self._watched(first)

    @property
    def signals(self) -> DataChannel:
        return self._signals

    def _watched(self, channel: webrtc.RTCDataChannel) -> WrtcChannel:
        watched = WrtcChannel(channel)
        self._channels.add(watched)
        return watched

    # --- descriptions ---------------------------------------------------------------------------------

    async def offer(self) -> str:
        return await self._described(self._connection.create_offer)

    async def answer(self, offer: str) -> str:
        await self._take("offer", offer)
        return await self._described(self._connection.create_answer)

    async def accept(self, answer: str) -> None:
        await self._take("answer", answer)

    async def restart(self) -> str:
        options = webrtc.RTCOfferOptions(ice_restart=True)
        return await self._described(lambda: self._connection.create_offer(options))

    async def _described(
        self, create: Callable[[], Coroutine[Any, Any, webrtc.RTCSessionDescriptionInit]]
    ) -> str:
        """Make a description ours, and give candidates a moment to be in it."""
        try:
            description = await self._unless_closed(create())
            sdp = str(description.sdp)
            self._ufrag = attribute(sdp, "ice-ufrag")
            self._found.clear()
            self._returned = False
            self._gathered.clear()
            await self._unless_closed(self._connection.set_local_description(description))
            self._watch_path()
        except webrtc.RTCException as exc:
            raise ConnectionLostError(f"the connection makes no description any more: {exc}") from exc
        try:
            async with asyncio.timeout(_GATHER_SECONDS):
                await self._gathered.wait()
        except TimeoutError:
            pass  # the others follow one by one
        self._check_open()
        sdp += "".join(f"a={candidate}\r\n" for candidate in self._found)
        if self._gathered.is_set():
            sdp += "a=end-of-candidates\r\n"
        # Should one come before the caller has what this returns, it waits for its turn behind that.
        self._loop.call_soon(self._begin_trickle, len(self._found), self._gathered.is_set())
        return sdp

    def _begin_trickle(self, named: int, complete: bool) -> None:
        self._returned = True
        for candidate in self._found[named:]:
            self.on_candidate(candidate)
        if self._gathered.is_set() and not complete:
            self.on_candidate("")

    def _candidate_found(self, event: webrtc.RTCPeerConnectionIceEvent) -> None:
        found = event.candidate
        if found is None:
            self._gathered.set()
            if self._returned:
                self.on_candidate("")
        elif is_usable(found.candidate) and found.username_fragment == self._ufrag:
            self._found.append(found.candidate)
            if self._returned:
                self.on_candidate(found.candidate)

    async def _take(self, kind: Literal["offer", "answer"], sdp: str) -> None:
        self._check_open()
        check_description(sdp)
        if self._remote:
            check_restart(self._remote, sdp)
        given = webrtc.RTCSessionDescriptionInit(kind, with_usable_candidates(sdp))
        try:
            await self._unless_closed(self._connection.set_remote_description(given))
        except (webrtc.RTCException, ValueError, TypeError) as exc:
            raise ProtocolError(f"the peer sent an {kind} that cannot be used: {exc}") from exc
        self._remote = sdp

    async def add_candidate(self, candidate: str) -> None:
        if not candidate or not is_usable(candidate) or self._closed:
            return
        ufrag = username_of(candidate)
        if ufrag not in (None, attribute(self._remote, "ice-ufrag")):
            return
        try:
            await self._unless_closed(
                self._connection.add_ice_candidate(webrtc.RTCIceCandidateInit(candidate, _MID, 0, ufrag))
            )
        except (webrtc.RTCException, ValueError, TypeError, ConnectionLostError) as exc:
            logger.debug("a candidate of the peer was ignored: %r", exc)

    async def _unless_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """wrtc cancels what is under way when the connection is closed; no task of ours is cancelled."""
        if self._closed:
            work.close()
            self._check_open()
        try:
            return await work
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if self._closed and task and not task.cancelling():
                raise ConnectionLostError("the connection is closed") from exc
            raise

    def _check_open(self) -> None:
        if self._closed or self._lost:
            raise ConnectionLostError(self._lost or "the connection is closed")

    # --- state ----------------------------------------------------------------------------------------

    def _state_changed(self) -> None:
        state = self._connection.connection_state
        if state == "connected" and not self._connected.done():
            self._connected.set_result(None)
        elif state == "disconnected":
            self.on_unanswered()
        elif state == "failed" and self._connection.signaling_state == "stable":
            # Else a restart is under way, which finds another path, or fails in turn.
            self._has_lost("the connection broke" if self._connected.done() else "no path to it was found")

    def _watch_path(self) -> None:
        """There is something to watch once there is a description."""
        if self._ice is None and (sctp := self._connection.sctp):
            self._ice = sctp.transport.ice_transport
            self._ice.on("selectedcandidatepairchange", lambda event: self._path_changed())

    def _path_changed(self) -> None:
        if self._connected.done() and not self._lost and not self._closed:
            self.on_moved()

    def _has_lost(self, reason: str) -> None:
        if self._closed:
            return
        self._lost = reason
        if not self._connected.done():
            self._connected.set_exception(ConnectionLostError(reason))
            self._connected.exception()  # seen here: nobody may wait
        self.on_lost(reason)

    async def connected(self) -> None:
        await asyncio.shield(self._connected)

    async def open_channel(self) -> DataChannel:
        self._check_open()
        try:
            channel = self._watched(self._connection.create_data_channel(CHANNEL_LABEL))
        except webrtc.RTCException as exc:
            raise ConnectionLostError(f"the connection takes no more channels: {exc}") from exc
        try:
            await channel.opened()
        except BaseException:
            channel.close()
            raise
        return channel

    @property
    def unanswered(self) -> bool:
        return not self._closed and self._connection.connection_state == "disconnected"

    @property
    def path(self) -> str:
        if not self._closed and (pair := self._pair()):
            self._path = path_of(pair)
        return self._path

    def _pair(self) -> _Pair | None:
        pair = self._ice.get_selected_candidate_pair() if self._ice else None
        if pair is None:
            return None
        local, remote = pair.local, pair.remote
        # A reflexive address of ours is that of the router; what it stands before is the related one.
        own = local.address if local.type in ("host", "relay") else local.related_address
        return _Pair(
            _Candidate(str(local.type), own or ""), _Candidate(str(remote.type), remote.address or "")
        )

    async def close(self) -> None:
        if self._closed:
            return
        self._path = self.path
        self._closed = True
        self._connection.close()  # after which nothing more is heard of it
        self._gathered.set()
        if not self._connected.done():
            self._connected.set_exception(ConnectionLostError("the connection was closed"))
            self._connected.exception()
        for channel in tuple(self._channels):
            channel.ended()


@functools.cache
def _allow_loopback_if_alone() -> None:
    """On a machine with no network, peers of that machine still find each other."""
    if not own_networks():
        try:
            webrtc.allow_loopback()
        except webrtc.InvalidStateError:
            logger.debug("someone else has made connections before")
