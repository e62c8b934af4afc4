"""When a new path is asked for, again, and no more; and when a peer is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import pytest

from swarmcore.errors import ConnectionLostError, PeerUnreachableError
from swarmcore.tasks import BackgroundTasks
from swarmcore.wire.limits import Limits

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from swarmcore_transports.webrtc.ice_restarts import IceRestarter
from swarmcore_transports.webrtc.peer_connections import ManagedConnection, PeerConnections

pytestmark = pytest.mark.virtual_time

LIMITS = Limits(keepalive=3.0)


@attrs.define(eq=False)
class Connection:
    """A connection as far as `IceRestarter` looks at it."""

    unanswered: bool = False
    path: str = "direct"
    closed: bool = False

    async def close(self) -> None:
        self.closed = True


class Dialler:
    """A connection that was dialled, and what becomes of asking for a new path for it."""

    def __init__(self) -> None:
        self.tasks = BackgroundTasks()
        self.connections = PeerConnections(LIMITS)
        self.restarts = IceRestarter(self.connections, LIMITS, self.ask, lambda gone: None, self.tasks)
        self.connection: Any = Connection()
        self.managed = ManagedConnection("peer", self.connection, b"exchange", "service")  # type: ignore[arg-type]
        self.connections.add(self.managed)
        self.asked_at: list[float] = []
        self.answers: list[Callable[[], None] | None] = []
        """What asking does, one after the other: return, raise, or wait forever (None); at last, return."""

    async def ask(self, managed: ManagedConnection) -> None:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.answers:
            answer = self.answers.pop(0)
            if answer is None:
                await asyncio.get_running_loop().create_future()
            else:
                answer()

    async def done(self) -> None:
        while self.tasks:
            await asyncio.wait(tuple(self.tasks._tasks))


def refused() -> None:
    raise PeerUnreachableError("it is not connected to this signalling service")


def gone() -> None:
    raise ConnectionLostError("the connection is gone")


@pytest.fixture
async def dialler() -> AsyncIterator[Dialler]:
    dialler = Dialler()
    yield dialler
    await dialler.restarts.close()
    await dialler.done()
    await dialler.connections.close()


async def test_one_answer_is_enough(dialler: Dialler) -> None:
    dialler.connection.unanswered = True
    dialler.restarts.unanswered(dialler.managed)
    dialler.restarts.unanswered(dialler.managed)
    await dialler.done()
    assert len(dialler.asked_at) == dialler.restarts.begun == 1
    dialler.restarts.unanswered(dialler.managed)  # ICE has its time to look
    assert dialler.restarts.begun == 1


async def test_who_does_not_answer_is_asked_again_while_the_old_path_is_dead(dialler: Dialler) -> None:
    dialler.connection.unanswered = True
    dialler.answers = [None, None]
    dialler.restarts.begin(dialler.managed, "it is silent")
    await dialler.done()
    first, second, third = dialler.asked_at
    assert second - first == third - second == pytest.approx(LIMITS.keepalive)
    assert dialler.connections.current() == [dialler.managed]


async def test_nobody_is_asked_again_when_the_old_path_works(dialler: Dialler) -> None:
    dialler.answers = [None]
    dialler.restarts.begin(dialler.managed, "it was silent")
    await dialler.done()
    assert len(dialler.asked_at) == 1
    assert dialler.connections.current() == [dialler.managed]


async def test_on_another_network_what_was_asked_before_is_forgotten(dialler: Dialler) -> None:
    dialler.connection.unanswered = True
    dialler.answers = [None]
    dialler.restarts.begin(dialler.managed, "it is silent")
    await asyncio.sleep(0.5)
    dialler.restarts.begin(dialler.managed, "another network", anew=True)
    await dialler.done()
    first, second = dialler.asked_at
    assert second - first == pytest.approx(0.5)
    assert dialler.restarts.begun == 1


async def test_a_peer_that_is_not_found_and_acknowledges_nothing_is_lost(dialler: Dialler) -> None:
    dialler.connection.unanswered = True
    dialler.answers = [refused]
    dialler.restarts.unanswered(dialler.managed)
    await dialler.done()
    assert not dialler.connections.current()
    assert len(dialler.asked_at) == 1


async def test_a_peer_that_is_not_found_and_is_heard_again_is_kept(dialler: Dialler) -> None:
    dialler.connection.unanswered = True
    dialler.answers = [refused]
    dialler.restarts.unanswered(dialler.managed)
    await asyncio.sleep(0.5)
    dialler.connection.unanswered = False
    await dialler.done()
    assert dialler.connections.current() == [dialler.managed]
    assert len(dialler.asked_at) == 1


async def test_a_connection_that_cannot_move_is_lost(dialler: Dialler) -> None:
    dialler.answers = [gone]
    dialler.restarts.begin(dialler.managed, "it is silent")
    await dialler.done()
    assert not dialler.connections.current()


async def test_the_side_that_was_dialled_asks_for_nothing(dialler: Dialler) -> None:
    dialler.managed.dialled = None
    dialler.restarts.unanswered(dialler.managed)
    assert not dialler.restarts.begun
