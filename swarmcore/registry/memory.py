"""A registry inside one process, for tests and simulation: a directory that all its members share."""

from __future__ import annotations

import asyncio
from types import MappingProxyType

from swarmcore.errors import InputError, PeerUnreachableError, UnavailableError
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.changes import ChangeFeed, ChangeReader
from swarmcore.types import PeerId, ServerInfo


class MemoryDirectory:
    """What the registries of one process share. Peers on different directories do not see each other."""

    def __init__(self) -> None:
        self._servers: dict[PeerId, ServerInfo] = {}
        self._expiries: dict[PeerId, asyncio.TimerHandle] = {}
        self._view = SwarmView(MappingProxyType({}))
        self._feeds: list[ChangeFeed] = []

    def __repr__(self) -> str:
        return f"<MemoryDirectory {len(self._servers)} servers>"

    def _set(self, peer: PeerId, info: ServerInfo | None) -> None:
        before = self._servers.get(peer)
        if before == info:
            return
        if info is not None:
            self._servers[peer] = info
            change = Change("updated" if before else "joined", info)
        elif before is not None:
            del self._servers[peer]
            change = Change("left", before)
        self._view = SwarmView(MappingProxyType(self._servers.copy()), self._view.revision + 1)
        for feed in self._feeds:
            feed.publish(change)

    def _expire_after(self, peer: PeerId, ttl: float | None) -> None:
        if timer := self._expiries.pop(peer, None):
            timer.cancel()
        if ttl is not None:
            self._expiries[peer] = asyncio.get_running_loop().call_later(ttl, self._set, peer, None)


class MemoryRegistry(Registry):
    """One peer's registry on a shared `MemoryDirectory`: changes are seen by all at once.

    Announcements are kept fresh until `withdraw` or `close`; after `close` they last for their ttl. Nothing
    is signed or checked, apart from the peer id.
    """

    def __init__(self, peer: PeerId, directory: MemoryDirectory) -> None:
        self.peer = peer
        self._directory = directory
        self._feed = ChangeFeed()
        self._ttl: float | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryRegistry {self._directory!r}>"

    async def start(self) -> None:
        if self._closed:
            raise PeerUnreachableError("this registry is closed")
        if self._feed not in self._directory._feeds:
            self._directory._feeds.append(self._feed)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._feed in self._directory._feeds:
            self._directory._feeds.remove(self._feed)
        self._feed.close()
        if self._ttl is not None:
            self._directory._expire_after(self.peer, self._ttl)

    async def announce(self, info: ServerInfo, ttl: float) -> None:
        if self._closed:
            raise UnavailableError("this registry is closed")
        if info.peer != self.peer:
            raise InputError(f"peer {self.peer} cannot announce in the name of {info.peer}")
        if not 0 < ttl < float("inf"):
            raise InputError(f"ttl of {ttl} s is not above 0")
        self._ttl = ttl
        self._directory._expire_after(self.peer, None)
        self._directory._set(self.peer, info)

    async def withdraw(self) -> None:
        if self._ttl is not None:
            self._ttl = None
            self._directory._set(self.peer, None)

    def view(self) -> SwarmView:
        return self._directory._view

    def changes(self) -> ChangeReader:
        return self._feed.reader()
