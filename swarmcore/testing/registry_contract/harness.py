"""How the contract reaches a backend: peers that join, announce and crash."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import attrs

from swarmcore.identity import Identity
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.types import ServerInfo


@attrs.frozen
class Member:
    """A peer of the swarm under test, its registry started."""

    identity: Identity
    registry: Registry
    addresses: tuple[str, ...] = ()

    def info(self, **fields: Any) -> ServerInfo:
        """Something this peer may announce."""
        return ServerInfo(self.identity.peer, self.addresses, **fields)

    def knows(self, *infos: ServerInfo) -> bool:
        """Whether this member's view consists of just ``infos``."""
        return dict(self.registry.view().servers) == {info.peer: info for info in infos}


class RegistrySwarm(ABC):
    """A swarm of one backend, for one test."""

    ttl: float = 30.0
    """Seconds: short, but long enough for a record to be kept fresh and to reach everyone meanwhile."""
    patience: float = 60.0
    """Seconds in which any change has reached everyone, a death included."""
    many: int = 16
    """Members that find each other."""

    @abstractmethod
    async def join(self, identity: Identity | None = None) -> Member:
        """A new member, started, that joined through one of those before it. It may be one that crashed."""

    @abstractmethod
    async def crash(self, member: Member) -> None:
        """End ``member`` like a killed process."""

    @abstractmethod
    async def aclose(self) -> None:
        """End all members."""

    async def until(self, member: Member, condition: Callable[[SwarmView], bool]) -> None:
        """Wait until ``condition`` holds for the view of ``member``; `TimeoutError` after `patience`."""
        changes = member.registry.changes()
        async with asyncio.timeout(self.patience):
            while not condition(member.registry.view()):
                await anext(changes)

    async def until_known(self, member: Member, *infos: ServerInfo) -> None:
        """Wait until the view of ``member`` consists of just ``infos``."""
        expected = {info.peer: info for info in infos}
        await self.until(member, lambda view: dict(view.servers) == expected)
