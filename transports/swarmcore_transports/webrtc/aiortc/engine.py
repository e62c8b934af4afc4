"""aiortc, the WebRTC implementation in Python, as an engine of the transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aioice import Candidate
from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidStateError
from aiortc.rtcconfiguration import RTCBundlePolicy, RTCIceTransportPolicy

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError
from swarmcore_transports.webrtc.aiortc.ice_agent import TrickleIceAgent
from swarmcore_transports.webrtc.aiortc.ice_transport import RestartableIceTransport
from swarmcore_transports.webrtc.aiortc.repairs import repaired
from swarmcore_transports.webrtc.aiortc.sctp_sender import RackSctpTransport
from swarmcore_transports.webrtc.engine import CHANNEL_LABEL, DataChannel, PeerConnection
from swarmcore_transports.webrtc.ice import IceServer
from swarmcore_transports.webrtc.sdp import (
    CandidatePair,
    IceParameters,
    check_description,
    ice_parameters,
    is_named,
    path_of,
    username_of,
    with_ice,
    without_names,
)

logger = logging.getLogger(__name__)


class AiortcChannel(DataChannel):
    """`RTCDataChannel` of aiortc. What is sent before it is open waits here."""

    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel
        self._waiting: list[bytes] = []
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if channel.readyState == "open":
            self._opened.set_result(None)
        channel.on("open", self._open)
        channel.on("message", self._received)
        channel.on("bufferedamountlow", self._low)
        channel.on("close", self.ended)

    async def opened(self) -> None:
        """Wait until it is open. Raise `ConnectionLostError` when it was closed instead."""
        await asyncio.shield(self._opened)

    def _open(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self.send(data)

    def _received(self, data: bytes | str) -> None:
        if isinstance(data, bytes):
            self._message(data)
        else:  # nothing that we send
            logger.debug("a channel was closed on which text came")
            self.close()
            self.ended()

    @property
    def buffered_amount(self) -> int:
        return int(self._channel.bufferedAmount) + sum(map(len, self._waiting))

    def set_low_threshold(self, amount: int) -> None:
        self._channel.bufferedAmountLowThreshold = amount

    def send(self, data: bytes) -> None:
        if self._channel.readyState == "connecting" and not self._closed:
            self._waiting.append(data)
            return
        with contextlib.suppress(InvalidStateError):
            self._channel.send(data)

    def ended(self) -> None:
        """The channel is closed, by whomever. Harmless when repeated."""
        if self._closed:
            return
        self._waiting.clear()
        if not self._opened.done():
            self._opened.set_exception(ConnectionLostError("the connection was closed"))
            self._opened.exception()  # seen here: nobody may wait
        self._ended()

    def close(self) -> None:
        self._channel.close()


class AiortcConnection(PeerConnection):
    """`RTCPeerConnection` of aiortc with our SCTP and ICE in it."""

    def __init__(self, ice: Sequence[IceServer], *, relay_only: bool = False) -> None:
        super().__init__(ice, relay_only=relay_only)
        self._ice = tuple(ice)
        self._relay_only = relay_only
        # Asked by aiortc's own ICE only, which our agents replace where they can; it reads no [::1].
        servers = [RTCIceServer(one.url, one.user, one.password) for one in ice if ":" not in one.host]
        policy = RTCIceTransportPolicy.RELAY if relay_only else RTCIceTransportPolicy.ALL
        self._connection = RTCPeerConnection(
            RTCConfiguration(
                iceServers=servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE, iceTransportPolicy=policy
            )
        )
        self._connection.on("datachannel", lambda channel: self.on_channel(self._watched(channel)))
        self._connection.on("connectionstatechange", self._state_changed)
        loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] | None = None
        self._lost: str | None = None
        self._describing = asyncio.Lock()
        self._channels: weakref.WeakSet[AiortcChannel] = weakref.WeakSet()
        self._connected: asyncio.Future[None] = loop.create_future()
        self._path = "direct"
        self._peer_username = ""
        self._left_out = False
        """Whether a candidate of the latest description was, so that their end is not the end."""
        with repaired(self._make_agent):
            first = self._connection.createDataChannel("swarmcore", negotiated=True, id=0)
        # Not from inside: aiortc closes one channel after the other, and must not find one closed meanwhile.
        first.on("close", lambda: loop.call_soon(self._has_lost, "the peer has ended it"))
        self._signalling_channel = self._watched(first)
        assert self._connection.sctp
        self._sctp = self._connection.sctp
        if isinstance(self._sctp, RackSctpTransport):
            self._sctp.on_unanswered = lambda: self.on_unanswered()
        transport = self._sctp.transport.transport
        self._transport = transport if isinstance(transport, RestartableIceTransport) else None
        if self._transport:
            self._transport.on_path_changed = self._moved

    def _make_agent(self, controlling: bool) -> TrickleIceAgent:
        def found(candidate: Candidate | None) -> None:
            if candidate:
                self.on_candidate(f"candidate:{candidate.to_sdp()} ufrag {agent.local_username}")
            else:
                self.on_candidate("")

        agent = TrickleIceAgent(self._ice, found, relay_only=self._relay_only, controlling=controlling)
        return agent

    def _moved(self) -> None:
        self._path = path_of(self._nominated())
        if isinstance(self._sctp, RackSctpTransport):
            self._sctp.path_changed()
        self.on_path_changed()

    def _state_changed(self) -> None:
        state = self._connection.connectionState
        if state == "connected" and not self._connected.done():
            self._path = path_of(self._nominated())
            self._connected.set_result(None)
        elif state in ("failed", "closed"):
            self._has_lost("the connection broke" if self._connected.done() else "no path to it was found")

    def _has_lost(self, reason: str) -> None:
        if self._closing is None:
            self._end(reason)
            self.on_lost(reason)

    def _end(self, reason: str) -> None:
        """Nobody waits any more for what cannot come."""
        self._lost = reason
        if not self._connected.done():
            self._connected.set_exception(ConnectionLostError(reason))
            self._connected.exception()  # seen here: nobody may wait
        for channel in tuple(self._channels):
            channel.ended()

    def _check_open(self) -> None:
        if self._closing or self._lost:
            raise ConnectionLostError(self._lost or "the connection is closed")

    @property
    def signalling_channel(self) -> DataChannel:
        return self._signalling_channel

    def _watched(self, channel: Any) -> AiortcChannel:
        watched = AiortcChannel(channel)
        self._channels.add(watched)
        return watched

    @contextlib.asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        """One description at a time; `close` waits for it, lest it be left behind."""
        self._check_open()
        async with self._describing:
            self._check_open()
            yield
            self._check_open()

    # --- the first path -------------------------------------------------------------------------------

    async def offer(self) -> str:
        async with self._one_at_a_time():
            await self._connection.setLocalDescription(await self._connection.createOffer())
        return self._local_description()

    async def answer(self, offer: str) -> str:
        async with self._one_at_a_time():
            if self._connected.done():
                return await self._answer_restart(offer)
            await self._take(offer, "offer")
            await self._connection.setLocalDescription(await self._connection.createAnswer())
        return self._local_description()

    async def accept(self, answer: str) -> None:
        async with self._one_at_a_time():
            if self._connected.done():
                check_description(answer)
                await self._move_to(ice_parameters(answer))
            else:
                await self._take(answer, "answer")

    def _local_description(self) -> str:
        sdp = str(self._connection.localDescription.sdp)
        if self._relay_only and "a=candidate:" not in sdp:
            reason = getattr(self._agent_in_use(), "relay_failure", None) or "no TURN server answers"
            raise PeerUnreachableError(f"only a relay may be used, and there is none: {reason}")
        return sdp

    async def _take(self, sdp: str, kind: str) -> None:
        check_description(sdp)
        parameters = ice_parameters(sdp)
        self._peer_username = parameters.username
        self._left_out = any(map(is_named, parameters.candidates))
        try:
            await self._connection.setRemoteDescription(RTCSessionDescription(without_names(sdp), kind))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, InvalidStateError) as exc:
            raise ProtocolError(f"the peer sent an {kind} that cannot be read: {exc!r}") from exc

    async def connected(self) -> None:
        await asyncio.shield(self._connected)

    # --- a new path -----------------------------------------------------------------------------------

    async def restart(self) -> str:
        async with self._one_at_a_time():
            agent = await self._gather_anew()
        return with_ice(self._connection.localDescription.sdp, _parameters(agent))

    async def _answer_restart(self, offer: str) -> str:
        check_description(offer)
        agent = await self._gather_anew()
        await self._move_to(ice_parameters(offer))
        return with_ice(self._connection.localDescription.sdp, _parameters(agent))

    async def _gather_anew(self) -> TrickleIceAgent:
        if self._transport is None:
            raise ConnectionLostError("this version of aiortc cannot restart ICE")
        return await self._transport.gather_anew()

    async def _move_to(self, parameters: IceParameters) -> None:
        assert self._transport
        self._peer_username = parameters.username
        self._left_out = False
        for candidate in parameters.candidates:
            await self.add_candidate(candidate)
        self._transport.move_to(parameters.username, parameters.password)

    async def add_candidate(self, candidate: str) -> None:
        agent = self._transport.newest if self._transport else self._agent_in_use()
        if username_of(candidate) not in (None, self._peer_username):
            return
        with contextlib.suppress(ValueError, LookupError, AssertionError):  # nonsense, or after the end
            if is_named(candidate):
                self._left_out = True
            elif not candidate:
                if not self._left_out:
                    await agent.add_remote_candidate(None)
            else:
                parsed = Candidate.from_sdp(candidate.removeprefix("a=").removeprefix("candidate:"))
                await agent.add_remote_candidate(parsed)

    # --- channels -------------------------------------------------------------------------------------

    async def open_channel(self) -> DataChannel:
        self._check_open()
        try:
            channel = self._watched(self._connection.createDataChannel(CHANNEL_LABEL))
        except InvalidStateError as exc:
            raise ConnectionLostError("the connection is closed") from exc
        try:
            await channel.opened()
        except BaseException:
            channel.close()
            raise
        return channel

    @property
    def unanswered(self) -> bool:
        return isinstance(self._sctp, RackSctpTransport) and self._sctp.unanswered

    def probe_peer(self) -> None:
        if isinstance(agent := self._agent_in_use(), TrickleIceAgent):
            agent.probe_peer()

    @property
    def path(self) -> str:
        return self._path

    def _nominated(self) -> CandidatePair | None:
        """Of aioice, which aiortc does not show; gone once the connection is closed."""
        pair: CandidatePair | None = self._agent_in_use()._nominated.get(1)
        return pair

    def _agent_in_use(self) -> Any:
        return self._sctp.transport.transport._connection

    async def close(self) -> None:
        if self._closing is None:  # aiortc fails when it is asked twice
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._end(self._lost or "the connection was closed")
        if self._transport:
            self._transport.newest.hurry()
        async with self._describing:
            await self._connection.close()


def _parameters(agent: TrickleIceAgent) -> IceParameters:
    candidates = tuple(f"candidate:{one.to_sdp()}" for one in agent.local_candidates)
    return IceParameters(agent.local_username, agent.local_password, candidates, complete=not agent.gathering)
