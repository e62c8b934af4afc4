"""A WebRTC engine as somebody else may write one: both ends are in this process, without a socket."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import ClassVar

from swarmcore.errors import ConnectionLostError, ProtocolError
from swarmcore_transports.webrtc.engine import DataChannel, PeerConnection
from swarmcore_transports.webrtc.ice import IceServer


class MemoryChannel(DataChannel):
    """What is sent arrives at ``far`` in the next turn of the event loop."""

    far: MemoryChannel

    @classmethod
    def both_ends(cls) -> tuple[MemoryChannel, MemoryChannel]:
        near, far = cls(), cls()
        near.far, far.far = far, near
        return near, far

    @property
    def buffered_amount(self) -> int:
        return 0

    def set_low_threshold(self, amount: int) -> None: ...

    def send(self, data: bytes) -> None:
        if not self._closed:
            asyncio.get_running_loop().call_soon(self.far._message, bytes(data))

    def close(self) -> None:
        for end in (self, self.far):
            if not end._closed:
                asyncio.get_running_loop().call_soon(end._ended)


class MemoryConnection(PeerConnection):
    """Its descriptions are the number under which it is found."""

    made: ClassVar[dict[str, MemoryConnection]] = {}
    _numbers = itertools.count()

    def __init__(self, ice: Sequence[IceServer], *, relay_only: bool = False) -> None:
        super().__init__(ice, relay_only=relay_only)
        self._name = str(next(self._numbers))
        self.made[self._name] = self
        self._peer: MemoryConnection | None = None
        self._is_connected = asyncio.Event()
        self._signalling_channel, self._channel_of_peer = MemoryChannel.both_ends()
        self._closed = False

    @property
    def signalling_channel(self) -> DataChannel:
        return self._signalling_channel

    async def offer(self) -> str:
        return self._name

    async def answer(self, offer: str) -> str:
        if (peer := self.made.get(offer)) is None:
            raise ProtocolError(f"no connection {offer}")
        self._peer, self._signalling_channel = peer, peer._channel_of_peer
        self._is_connected.set()
        return self._name

    async def accept(self, answer: str) -> None:
        self._peer = self.made[answer]
        self._is_connected.set()

    async def restart(self) -> str:
        return self._name

    async def add_candidate(self, candidate: str) -> None: ...

    async def connected(self) -> None:
        await self._is_connected.wait()

    async def open_channel(self) -> DataChannel:
        if self._closed or self._peer is None:
            raise ConnectionLostError("the connection is closed")
        near, far = MemoryChannel.both_ends()
        self._peer.on_channel(far)
        return near

    @property
    def unanswered(self) -> bool:
        return False

    @property
    def path(self) -> str:
        return "direct"

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            del self.made[self._name]
            if self._peer and not self._peer._closed:
                self._peer.on_lost("the peer has ended it")
