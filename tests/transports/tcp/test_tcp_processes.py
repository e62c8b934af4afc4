"""Peers that die, freeze or do not read, as real processes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, UnavailableError
from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.tcp import TcpTransport

PEER = Path(__file__).with_name("silent_peer.py")
KEEPALIVE = 0.4


@asynccontextmanager
async def peer(
    behaviour: str, keepalive: float = KEEPALIVE
) -> AsyncIterator[tuple[asyncio.subprocess.Process, TcpTransport, Address]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PEER), behaviour, str(keepalive)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    transport = TcpTransport(Identity.generate(), limits=Limits(keepalive=KEEPALIVE, send_buffer=64 * 1024))
    try:
        async with asyncio.timeout(60):
            assert process.stdout
            yield process, transport, Address.parse((await process.stdout.readline()).decode().strip())
    finally:
        await transport.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_process_is_noticed_at_once() -> None:
    async with peer("echo", 1000.0) as (process, transport, address):
        stream, other = await transport.open_stream(address), await transport.open_stream(address)
        waiting = asyncio.create_task(stream.receive())
        await other.send(b"there")
        await other.receive()
        process.kill()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            while True:
                await other.send(b"anybody there?")
                await other.receive()
        with pytest.raises(PeerUnreachableError):
            await transport.open_stream(address)


async def test_a_frozen_process_is_noticed_by_its_silence() -> None:
    async with peer("echo") as (process, transport, address):
        stream = await transport.open_stream(address)
        await stream.send(b"there")
        await stream.receive()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionLostError, match="silent for 1"):
            await stream.receive()


async def test_a_frozen_process_is_noticed_by_a_blocked_sender() -> None:
    async with peer("hold") as (process, transport, address):
        stream = await transport.open_stream(address)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionLostError, match="silent"):
            while True:
                await stream.send(bytes(10_000))


async def test_a_peer_that_does_not_read_is_not_taken_for_dead() -> None:
    """Its application sleeps and ours waits in `send`: neither says a word, but both event loops live."""
    async with peer("hold") as (_, transport, address):
        stream = await transport.open_stream(address)

        async def flood() -> None:
            while True:
                await stream.send(bytes(10_000))

        flooding = asyncio.create_task(flood())
        done, _ = await asyncio.wait([flooding], timeout=5 * KEEPALIVE)
        assert not done
        flooding.cancel()
        await asyncio.wait([flooding])


async def test_an_idle_stream_stays() -> None:
    """The two sides' keep-alive times need not agree: each is heard as often as the other asks for."""
    async with peer("echo", 1000.0) as (_, transport, address):
        stream = await transport.open_stream(address)
        receiving = asyncio.create_task(stream.receive())
        done, _ = await asyncio.wait([receiving], timeout=5 * KEEPALIVE)
        assert not done
        await stream.send(b"still there")
        assert bytes(await receiving) == b"still there"
