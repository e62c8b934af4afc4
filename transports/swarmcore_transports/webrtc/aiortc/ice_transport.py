"""aiortc's ICE transport over an agent that trickles, and whose place another one can take: ICE restart.

A restart (RFC 8445, 9) has credentials and candidates of its own; until it has found a path, the old one is
used. So it is a second agent, beside the first. DTLS and SCTP above see datagrams come and go as before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aioice import ConnectionClosed
from aiortc import RTCIceGatherer, RTCIceTransport

from swarmcore_transports.webrtc.aiortc.ice_agent import TrickleIceAgent

logger = logging.getLogger(__name__)

MakeAgent = Callable[[bool], TrickleIceAgent]
"""An agent for one description; whether it is the controlling one."""


class TrickleIceGatherer(RTCIceGatherer):
    """`RTCIceGatherer` over the first agent that ``make`` makes."""

    def __init__(self, make: MakeAgent) -> None:
        super().__init__(iceServers=[])
        self.make = make
        self._connection = self.agent = make(False)

    @property
    def state(self) -> str:
        """Completed only when nothing more is to come: it is said in the description."""
        return "gathering" if super().state == "completed" and self.agent.gathering else super().state


class RestartableIceTransport(RTCIceTransport):
    """`RTCIceTransport` whose agent gives way to a newer one that has found a path; DTLS sees nothing."""

    def __init__(self, gatherer: TrickleIceGatherer) -> None:
        super().__init__(gatherer)
        self._make = gatherer.make
        self._next: TrickleIceAgent | None = None
        self._moving: asyncio.Task[None] | None = None
        self._recv = self._receive
        self._send = self._send_datagram
        self.on_path_changed: Callable[[], None] = lambda: None
        """Called when another agent has taken over."""

    async def _receive(self) -> bytes:
        while True:
            agent = self._connection
            try:
                return await agent.recv()
            except ConnectionError:
                if agent is self._connection and agent._closing:
                    raise  # else it was the end of the one before, heard through the queue that they share

    async def _send_datagram(self, data: bytes) -> None:
        await self._connection.send(data)

    async def _monitor(self) -> None:
        while True:
            agent = self._connection
            event = await agent.get_event()
            if agent is self._connection:
                if isinstance(event, ConnectionClosed) and self.state == "completed":
                    self._RTCIceTransport__setState("failed")  # type: ignore[attr-defined]
                return

    async def gather_anew(self) -> TrickleIceAgent:
        """An agent with candidates of the addresses that this machine has now.

        It replaces an earlier one that has found no path yet.
        """
        await self._give_up()
        agent = self._next = self._make(self._connection.ice_controlling)
        agent._queue = self._connection._queue  # what comes on either path is read
        await agent.gather_candidates()
        return agent

    def move_to(self, username: str, password: str) -> None:
        """Look for a path from `newest` to who has these credentials, and take it when there is one."""
        agent = self.newest
        agent.remote_username, agent.remote_password = username, password
        self._moving = asyncio.create_task(self._move_to(agent))

    async def _move_to(self, agent: TrickleIceAgent) -> None:
        try:
            await agent.connect()
        except ConnectionError as exc:
            logger.debug("no new path: %s", exc)
            return
        before, self._connection = self._connection, agent
        self._next = None
        await before.close()
        self.on_path_changed()

    async def _give_up(self) -> None:
        moving, agent = self._moving, self._next
        self._moving = self._next = None
        if moving:
            if agent:  # else it has moved, and closes the agent before
                moving.cancel()
            await asyncio.wait([moving])
        if agent:
            await agent.close()

    async def stop(self) -> None:
        await self._give_up()
        await super().stop()

    @property
    def newest(self) -> TrickleIceAgent:
        """The agent that is to take over, else the one in use: what a peer says is for it."""
        first: Any = self._connection  # as `TrickleIceGatherer` has made it
        return self._next or first
