"""What a swarm of processes and its client have open, counted before and after."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import attrs
import pytest

import swarmcore
from swarmcore.testing.fleet import Fleet

SPARE_DESCRIPTORS = 8
"""Connections to other members that a server may have more than another one had at another time."""

LEAK_TIMEOUT = 30.0
"""Seconds in which servers must have noticed that a session is over."""


@attrs.frozen
class Census:
    """What a swarm and its client have open."""

    tasks: dict[str, int]
    """Of this process's event loop, by name of their coroutine."""
    own_descriptors: int
    descriptors: int
    """Of the process of the fleet that has most."""
    sessions: int
    """On all servers together."""
    cache_tokens: int
    """In use, on all servers together."""

    @classmethod
    async def of(cls, fleet: Fleet) -> Census:
        async with swarmcore.connect(*fleet.addresses) as swarm:
            await fleet.seen_by(swarm)
            servers = [(await swarm.info(peer)).server for peer in fleet.members]
        processes = [member.process for member in fleet.members.values()]
        if fleet.bootstrap is not None:
            processes.append(fleet.bootstrap)
        return cls(
            tasks=Counter(_coroutines()),
            own_descriptors=_descriptors(os.getpid()),
            descriptors=max(_descriptors(process.pid) for process in processes),
            sessions=sum(server.sessions for server in servers),
            cache_tokens=sum(server.cache_tokens - server.cache_tokens_free for server in servers),
        )

    def has_back(self, now: Census) -> bool:
        """Whether ``now`` has nothing more open; servers that came later have other connections."""
        return (
            now.tasks == self.tasks
            and now.own_descriptors <= self.own_descriptors
            and now.descriptors <= self.descriptors + SPARE_DESCRIPTORS
            and (now.sessions, now.cache_tokens) == (self.sessions, self.cache_tokens)
        )

    async def comes_back(self, fleet: Fleet) -> None:
        """Wait for everything to be closed; fail when something stays open."""
        now = await Census.of(fleet)
        try:
            async with asyncio.timeout(LEAK_TIMEOUT):
                while not self.has_back(now):
                    await asyncio.sleep(0.2)
                    now = await Census.of(fleet)
        except TimeoutError:
            pytest.fail(f"something was left open: {now}, before it was {self}")


def _coroutines() -> list[str]:
    """What the tasks of this event loop run, those of the tests themselves aside."""
    running = [task.get_coro() for task in asyncio.all_tasks()]
    return [each.__qualname__ for each in running if "pytest_asyncio" not in each.cr_code.co_filename]


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
