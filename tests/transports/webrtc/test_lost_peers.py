"""Peers that are gone without a word: killed, or cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarmcore.errors import ConnectionLostError
from swarmcore.transport import Stream
from swarmcore.types import Address

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from aioice import ice as aioice  # noqa: E402
from webrtc_peers import dialler, listening  # noqa: E402

from swarmcore.wire.limits import Limits  # noqa: E402
from swarmcore_transports.webrtc.aiortc import ice_agent  # noqa: E402

PATIENT = Limits(keepalive=60.0)
"""By their own silence, streams end long after these tests."""

pytestmark = pytest.mark.skipif(
    "not sys.platform.startswith('linux')", reason="only Linux tells of closed ports"
)


@pytest.fixture(autouse=True)
def without_consent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """aioice's own, which end a connection after half a minute."""
    monkeypatch.setattr(aioice, "CONSENT_INTERVAL", 600.0)


ECHOING = """
import asyncio
from webrtc_peers import listening

async def main():
    async with listening() as (_, address):
        print(address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def echoing_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, Address]]:
    """A process that echoes, killed at the latest in the end, and its address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ECHOING, stdout=PIPE, env=environment
    )
    try:
        assert process.stdout
        async with asyncio.timeout(60):
            yield process, Address.parse((await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def opened(transport: Any, address: Address) -> Stream:
    """A stream over which something has been said."""
    stream: Stream = await transport.open_stream(address)
    await stream.send(b"one")
    assert await stream.receive() == b"one"
    return stream


async def is_lost(stream: Stream) -> None:
    await stream.send(b"two")
    with pytest.raises(ConnectionLostError):
        await stream.receive()


async def test_a_peer_whose_port_is_closed_is_lost_once_something_is_sent() -> None:
    async with echoing_process() as (process, address), dialler(PATIENT) as a:
        stream = await opened(a, address)
        process.kill()
        await is_lost(stream)
        assert a._connector.restarter.begun == 0
        assert not a._connector.connections.current()


async def test_a_peer_whose_signalling_service_goes_with_it_is_lost_at_once() -> None:
    async with echoing_process() as (process, address), dialler(PATIENT) as a:
        stream = await opened(a, address)
        process.kill()
        with pytest.raises(ConnectionLostError):
            await stream.receive()
        assert not a._connector.connections.current()


async def test_a_peer_that_nobody_tells_of_is_lost_when_signalling_does_not_find_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a firewall drops what would tell that the port is closed."""
    monkeypatch.setattr(ice_agent, "watch_refusals", lambda *_: None)
    async with echoing_process() as (process, address), dialler(PATIENT) as a:
        stream = await opened(a, address)
        process.kill()
        await is_lost(stream)
        assert a._connector.restarter.begun == 1
        assert not a._connector.connections.current()


async def test_a_peer_that_only_pauses_is_kept() -> None:
    async with echoing_process() as (process, address), dialler(PATIENT) as a:
        stream = await opened(a, address)
        [managed] = a._connector.connections.current()
        unanswered, told = asyncio.Event(), managed.connection.on_unanswered
        managed.connection.on_unanswered = lambda: (told(), unanswered.set())
        process.send_signal(signal.SIGSTOP)
        await stream.send(b"two")
        await unanswered.wait()
        assert a._connector.restarter.begun == 1
        process.send_signal(signal.SIGCONT)
        assert await stream.receive() == b"two"
        assert not managed.connection.unanswered
        assert a._connector.connections.current() == [managed]


async def test_a_forged_refusal_ends_nothing() -> None:
    async with listening() as (_, address), dialler() as a:
        stream = await opened(a, address)
        [managed] = a._connector.connections.current()
        agent = managed.connection._agent_in_use()
        [pair] = agent._nominated.values()
        for _ in range(3):
            agent._refused(*pair.remote_addr)
            asking = agent._probing
            agent._refused(*pair.remote_addr)
            assert agent._probing is asking
            await asking
        agent._refused("192.0.2.1", 1)
        assert agent._probing is None
        await stream.send(b"two")
        assert await stream.receive() == b"two"
