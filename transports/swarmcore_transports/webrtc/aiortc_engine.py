"""aiortc, the WebRTC implementation in Python, as an engine of the transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from aioice import Candidate
from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidStateError
from aiortc.rtcconfiguration import RTCBundlePolicy, RTCIceTransportPolicy

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, ProtocolError, SwarmError
from swarmcore_transports.webrtc.aiortc_ice import RestartableIceTransport, restartable_ice
from swarmcore_transports.webrtc.candidates import CandidatePair, path_of
from swarmcore_transports.webrtc.descriptions import (
    IceParameters,
    check_description,
    ice_parameters,
    is_named,
    username_of,
    with_ice,
    without_names,
)
from swarmcore_transports.webrtc.engine import CHANNEL_LABEL, DataChannel, PeerConnection
from swarmcore_transports.webrtc.ice import IceServer
from swarmcore_transports.webrtc.ice_agent import TricklingAgent
from swarmcore_transports.webrtc.sctp import QuickSctpTransport, quick_data_channels

logger = logging.getLogger(__name__)


class AiortcChannel(DataChannel):
    """`RTCDataChannel` of aiortc."""

    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel
        channel.on("message", self._received)
        channel.on("bufferedamountlow", self._low)
        channel.on("close", self._ended)

    def _received(self, data: bytes | str) -> None:
        if isinstance(data, bytes):
            self._message(data)
        else:  # nothing that we send
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
        self._connection.on("datachannel", lambda channel: self.on_channel(AiortcChannel(channel)))
        self._connection.on("connectionstatechange", self._state_changed)
        loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] | None = None
        self._connected: asyncio.Future[None] = loop.create_future()
        self._path = "direct"
        self._peer_username = ""
        with restartable_ice(self._make_agent), quick_data_channels():
            first = self._connection.createDataChannel("swarmcore", negotiated=True, id=0)
        # Not from inside: aiortc closes one channel after the other, and must not find one closed meanwhile.
        first.on("close", lambda: loop.call_soon(lambda: self.on_lost("the peer has ended it")))
        self._signals = AiortcChannel(first)
        assert self._connection.sctp
        transport = self._connection.sctp.transport.transport
        self._transport = transport if isinstance(transport, RestartableIceTransport) else None
        if self._transport:
            self._transport.on_moved = self._moved

    def _make_agent(self, controlling: bool) -> TricklingAgent:
        def found(candidate: Candidate | None) -> None:
            if candidate:
                self.on_candidate(f"candidate:{candidate.to_sdp()} ufrag {agent.local_username}")
            else:
                self.on_candidate("")

        agent = TricklingAgent(self._ice, found, relay_only=self._relay_only, controlling=controlling)
        return agent

    def _moved(self) -> None:
        self._path = path_of(self._nominated())
        if isinstance(self._connection.sctp, QuickSctpTransport):
            self._connection.sctp.path_changed()
        self.on_moved()

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

    @property
    def signals(self) -> DataChannel:
        return self._signals

    # --- the first path -------------------------------------------------------------------------------

    async def offer(self) -> str:
        await self._connection.setLocalDescription(await self._connection.createOffer())
        return self._local_description()

    async def answer(self, offer: str) -> str:
        if self._connected.done():
            return await self._answer_restart(offer)
        await self._take(offer, "offer")
        await self._connection.setLocalDescription(await self._connection.createAnswer())
        return self._local_description()

    async def accept(self, answer: str) -> None:
        if self._connected.done():
            parameters = self._checked(answer, "answer")
            await self._move_to(parameters)
        else:
            await self._take(answer, "answer")

    def _local_description(self) -> str:
        sdp = str(self._connection.localDescription.sdp)
        if self._relay_only and "a=candidate:" not in sdp:
            raise PeerUnreachableError("only a relay may be used, and no TURN server gives one")
        return sdp

    async def _take(self, sdp: str, kind: str) -> None:
        self._peer_username = self._checked(sdp, kind).username
        try:
            await self._connection.setRemoteDescription(RTCSessionDescription(without_names(sdp), kind))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, InvalidStateError) as exc:
            raise _unreadable(kind, exc) from exc

    def _checked(self, sdp: str, kind: str) -> IceParameters:
        check_description(sdp)
        try:
            return ice_parameters(sdp)
        except ValueError as exc:
            raise _unreadable(kind, exc) from exc

    async def connected(self) -> None:
        await asyncio.shield(self._connected)

    # --- a new path -----------------------------------------------------------------------------------

    async def restart(self) -> str:
        agent = await self._gather_anew()
        return with_ice(self._connection.localDescription.sdp, _parameters(agent))

    async def _answer_restart(self, offer: str) -> str:
        parameters = self._checked(offer, "offer")
        agent = await self._gather_anew()
        await self._move_to(parameters)
        return with_ice(self._connection.localDescription.sdp, _parameters(agent))

    async def _gather_anew(self) -> TricklingAgent:
        if self._transport is None:
            raise ConnectionLostError("this version of aiortc cannot restart ICE")
        if self._connection.connectionState in ("failed", "closed"):
            raise ConnectionLostError("the connection is gone")
        return await self._transport.gather_anew()

    async def _move_to(self, parameters: IceParameters) -> None:
        assert self._transport
        self._peer_username = parameters.username
        for candidate in parameters.candidates:
            await self.add_candidate(candidate)
        self._transport.move_to(parameters.username, parameters.password)

    async def add_candidate(self, candidate: str) -> None:
        agent = self._transport.newest if self._transport else self._agent_in_use()
        if username_of(candidate) not in (None, self._peer_username):
            return
        with contextlib.suppress(ValueError, LookupError, AssertionError):  # nonsense, or after the end
            if not candidate:
                await agent.add_remote_candidate(None)
            elif not is_named(candidate):
                parsed = Candidate.from_sdp(candidate.removeprefix("a=").removeprefix("candidate:"))
                await agent.add_remote_candidate(parsed)

    # --- channels -------------------------------------------------------------------------------------

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
        pair: CandidatePair | None = self._agent_in_use()._nominated.get(1)
        return pair

    def _agent_in_use(self) -> Any:
        assert self._connection.sctp
        return self._connection.sctp.transport.transport._connection

    async def close(self) -> None:
        if self._closing is None:  # aiortc fails when it is asked twice
            self._closing = asyncio.ensure_future(self._connection.close())
        await asyncio.shield(self._closing)


def _parameters(agent: TricklingAgent) -> IceParameters:
    candidates = tuple(f"candidate:{one.to_sdp()}" for one in agent.local_candidates)
    return IceParameters(agent.local_username, agent.local_password, candidates, complete=not agent.gathering)


def _unreadable(kind: str, exc: Exception) -> ProtocolError:
    return ProtocolError(f"the peer sent an {kind} that cannot be read: {exc!r}")
