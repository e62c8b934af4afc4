"""One attempt for all who want the same peer, and none that drags down who comes late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarmcore.errors import PeerUnreachableError, StreamClosedError

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from swarmcore_transports.webrtc.peer_connections import DialSync

pytestmark = pytest.mark.virtual_time
TIMEOUT = 10.0


class Dialling:
    """Attempts that end when `ends` says so: in a connection, or not in time."""

    def __init__(self) -> None:
        self.begun = 0
        self.ends: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def __call__(self, peer: Any, service: Any) -> Any:
        self.begun += 1
        try:
            async with asyncio.timeout(TIMEOUT):
                return await asyncio.shield(self.ends)
        except TimeoutError as exc:
            raise PeerUnreachableError("it did not answer") from exc


@pytest.fixture
async def dialling() -> Dialling:
    return Dialling()


async def test_all_who_wait_share_one_attempt(dialling: Dialling) -> None:
    dials = DialSync(dialling, TIMEOUT)
    waiting = [asyncio.create_task(dials.dial("peer", "service")) for _ in range(3)]  # type: ignore[arg-type]
    await asyncio.sleep(1.0)
    waiting[0].cancel()
    dialling.ends.set_result("connected")
    assert await asyncio.gather(*waiting[1:]) == ["connected", "connected"]
    assert dialling.begun == 1
    assert not dials


async def test_each_who_waits_gets_the_error(dialling: Dialling) -> None:
    dials = DialSync(dialling, TIMEOUT)
    waiting = [dials.dial("peer", "service") for _ in range(3)]  # type: ignore[arg-type]
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [PeerUnreachableError] * 3
    assert len({id(error) for error in errors}) == 3
    assert dialling.begun == 1


async def test_who_comes_late_begins_another(dialling: Dialling) -> None:
    dials = DialSync(dialling, TIMEOUT)
    first = asyncio.create_task(dials.dial("peer", "service"))  # type: ignore[arg-type]
    await asyncio.sleep(TIMEOUT * 0.6)
    second = asyncio.create_task(dials.dial("peer", "service"))  # type: ignore[arg-type]
    with pytest.raises(PeerUnreachableError):
        await first
    assert len(dials) == 1
    dialling.ends.set_result("connected")
    assert await second == "connected"
    assert dialling.begun == 2


async def test_an_attempt_for_which_nobody_waits_fails_in_silence(dialling: Dialling) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    dials = DialSync(dialling, TIMEOUT)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await dials.dial("peer", "service")  # type: ignore[arg-type]
    await asyncio.wait(dials._running)
    await asyncio.sleep(0)
    assert not dials
    assert not complaints


async def test_the_end(dialling: Dialling) -> None:
    dials = DialSync(dialling, TIMEOUT)
    waiting = asyncio.create_task(dials.dial("peer", "service"))  # type: ignore[arg-type]
    await asyncio.sleep(1.0)
    await dials.close()
    with pytest.raises(StreamClosedError):
        await waiting
