"""Contract: what is announced is seen, in order, for as long as it holds.

`RegistrySwarm` is how the contract reaches a back end: peers that join, announce and crash.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.changes import READER_BOUND
from swarmcore.types import PeerId, ServerInfo


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


class RegistryContract:
    """The suite. A subclass provides the fixture ``swarm``, a `RegistrySwarm`."""

    async def test_an_empty_swarm_has_an_empty_view(self, swarm: RegistrySwarm) -> None:
        member = await swarm.join()
        assert len(member.registry.view()) == 0
        assert list(member.registry.view()) == []

    async def test_one_sees_ones_own_announcement_at_once(self, swarm: RegistrySwarm) -> None:
        member = await swarm.join()
        await member.registry.announce(member.info(), swarm.ttl)
        assert member.knows(member.info())

    async def test_others_see_it_soon(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(cache_tokens=512), swarm.ttl)
        await swarm.until_known(other, one.info(cache_tokens=512))

    async def test_who_joins_later_sees_it_as_soon_as_it_has_started(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        await one.registry.announce(one.info(), swarm.ttl)
        late = await swarm.join()
        assert late.knows(one.info())

    async def test_an_announcement_replaces_the_one_before(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(state="joining"), swarm.ttl)
        await swarm.until_known(other, one.info(state="joining"))
        await one.registry.announce(one.info(state="online"), swarm.ttl)
        await swarm.until_known(other, one.info(state="online"))
        assert one.knows(one.info(state="online"))

    async def test_a_withdrawal_is_seen_without_waiting_for_expiry(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(), 3000.0)
        await swarm.until_known(other, one.info())
        await one.registry.withdraw()
        assert one.knows()
        await swarm.until_known(other)

    async def test_what_was_withdrawn_can_be_announced_again(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.withdraw()  # nothing yet: harmless
        await one.registry.announce(one.info(sessions=1), swarm.ttl)
        await one.registry.withdraw()
        await one.registry.withdraw()
        await one.registry.announce(one.info(sessions=2), swarm.ttl)
        await swarm.until_known(other, one.info(sessions=2))

    async def test_a_living_peer_outlasts_its_ttl(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(), swarm.ttl)
        await swarm.until_known(other, one.info())
        changes = other.registry.changes()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * swarm.ttl):
                await anext(changes)
        assert other.knows(one.info())

    async def test_a_dead_peer_expires(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await other.registry.announce(other.info(), swarm.ttl)
        await one.registry.announce(one.info(), swarm.ttl)
        await swarm.until_known(other, one.info(), other.info())
        await swarm.crash(one)
        await swarm.until_known(other, other.info())

    async def test_a_dead_peer_comes_back_under_its_identity(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(sessions=1), swarm.ttl)
        await swarm.until_known(other, one.info(sessions=1))
        await swarm.crash(one)
        again = await swarm.join(one.identity)
        await again.registry.announce(again.info(sessions=2), swarm.ttl)
        await swarm.until_known(other, again.info(sessions=2))

    async def test_only_oneself_can_be_announced(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        with pytest.raises(InputError):
            await one.registry.announce(other.info(), swarm.ttl)
        with pytest.raises(InputError):
            await one.registry.announce(one.info(), 0.0)
        assert one.knows()

    async def test_a_view_does_not_change_and_revisions_grow(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        empty = one.registry.view()
        await one.registry.announce(one.info(sessions=1), swarm.ttl)
        before = one.registry.view()
        await one.registry.announce(one.info(sessions=2), swarm.ttl)
        after = one.registry.view()
        assert not empty.servers
        assert before.servers[one.identity.peer].sessions == 1
        assert after.servers[one.identity.peer].sessions == 2
        assert empty.revision < before.revision < after.revision
        with pytest.raises(TypeError):
            after.servers[one.identity.peer] = one.info()  # type: ignore[index]

    async def test_announcing_the_same_again_is_no_change(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        await one.registry.announce(one.info(), swarm.ttl)
        view = one.registry.view()
        await one.registry.announce(one.info(), swarm.ttl)
        assert one.registry.view().revision == view.revision

    async def test_changes_come_in_order(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        changes = other.registry.changes()
        async with asyncio.timeout(swarm.patience):
            await one.registry.announce(one.info(sessions=1), swarm.ttl)
            assert await anext(changes) == Change("joined", one.info(sessions=1))
            await one.registry.announce(one.info(sessions=2), swarm.ttl)
            assert await anext(changes) == Change("updated", one.info(sessions=2))
            await one.registry.withdraw()
            assert await anext(changes) == Change("left", one.info(sessions=2))

    async def test_changes_before_the_reader_are_not_told(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        await one.registry.announce(one.info(sessions=1), swarm.ttl)
        changes = one.registry.changes()
        await one.registry.announce(one.info(sessions=2), swarm.ttl)
        assert await anext(changes) == Change("updated", one.info(sessions=2))

    async def test_a_slow_reader_skips_but_is_not_misled(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        changes = one.registry.changes()
        for count in range(READER_BOUND + 10):
            await one.registry.announce(one.info(sessions=count), swarm.ttl)
        await one.registry.close()
        read = [change async for change in changes]
        assert len(read) <= READER_BOUND
        assert read[0].kind == "joined"
        assert read[-1].info.sessions == READER_BOUND + 9

    async def test_changes_tell_the_view(self, swarm: RegistrySwarm) -> None:
        watcher = await swarm.join()
        changes = watcher.registry.changes()
        seen: dict[PeerId, ServerInfo] = {}
        members = [await swarm.join() for _ in range(4)]
        for member in members:
            await member.registry.announce(member.info(), swarm.ttl)
        await members[0].registry.withdraw()
        await swarm.until_known(watcher, *(member.info() for member in members[1:]))
        await watcher.registry.close()
        async for change in changes:
            if change.kind == "left":
                seen.pop(change.info.peer)
            else:
                assert (change.info.peer in seen) == (change.kind == "updated")
                seen[change.info.peer] = change.info
        assert seen == dict(watcher.registry.view().servers)

    async def test_many_peers_find_each_other(self, swarm: RegistrySwarm) -> None:
        members = [await swarm.join() for _ in range(swarm.many)]
        for member in members:
            await member.registry.announce(member.info(), 3000.0)
        everyone = [member.info() for member in members]
        for member in members:
            await swarm.until_known(member, *everyone)

    async def test_close_ends_readers_and_may_be_repeated(self, swarm: RegistrySwarm) -> None:
        one = await swarm.join()
        await one.registry.announce(one.info(), swarm.ttl)
        waiting, late = one.registry.changes(), None
        reader = asyncio.ensure_future(anext(waiting, late))
        await asyncio.sleep(0)
        await one.registry.close()
        await one.registry.close()
        assert await reader is None
        assert await anext(one.registry.changes(), None) is None
        assert one.knows(one.info())  # the last view stays readable

    async def test_close_does_not_withdraw(self, swarm: RegistrySwarm) -> None:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(), 3000.0)
        await swarm.until_known(other, one.info())
        changes = other.registry.changes()
        await one.registry.close()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(swarm.ttl):
                await anext(changes)
        assert other.knows(one.info())
