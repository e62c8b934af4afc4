"""What strangers make a listener hold is bounded in fact: by its own process's peak memory."""

from __future__ import annotations

import asyncio
import gc
import sys
from asyncio.sslproto import SSLProtocol
from pathlib import Path

import pytest
from tcp_peers import listening, round_trip, settle

from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore_transports.framed.frames import FrameType, encode_frame
from swarmcore_transports.framed.stream import FramedStream
from swarmcore_transports.tcp import TcpTransport

PROGRAM = Path(__file__).with_name("holding_peer.py")
PART = 60 * 1024
TOTAL = 64 * 2**20


async def never_finish(stream: FramedStream) -> None:
    """Send all but the end of a message, as far as there is credit."""
    sent = 0
    while sent + PART < TOTAL:
        await stream._wait_for_credit(PART + (0 if sent else 256))
        header = encode_frame(FrameType.MORE if sent else FrameType.MESSAGE, value=0 if sent else TOTAL)
        stream._connection.write(header[:1], PART.to_bytes(4, "little"), header[5:], bytes(PART))
        sent += PART


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_messages_that_never_end_of_several_strangers_take_no_more_than_the_budget() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAM, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin and process.stdout
    strangers = [TcpTransport(Identity.generate()) for _ in range(4)]
    honest = TcpTransport(Identity.generate())
    try:
        async with asyncio.timeout(120):
            url, budget, before = (await process.stdout.readline()).decode().split()
            address = Address.parse(url)
            streams = [await one.open_stream(address) for one in strangers for _ in range(12)]
            sending = [asyncio.create_task(never_finish(stream)) for stream in streams]  # 3 GiB in all
            await asyncio.wait(sending, timeout=3.0)  # most of them wait for credit by now
            for _ in range(3):
                await round_trip(await honest.open_stream(address))
            process.stdin.write(b"peak?\n")
            peak = int(await process.stdout.readline()) - int(before)
            assert 2**26 < peak < 1.25 * int(budget)
            for task in sending:
                task.cancel()
            await asyncio.wait(sending)
    finally:
        process.stdin.close()
        await asyncio.gather(honest.close(), *(one.close() for one in strangers))
        async with asyncio.timeout(30):
            await process.wait()


def kept() -> int:
    return sum(type(each) in (FramedStream, SSLProtocol) for each in gc.get_objects())


async def test_nothing_holds_a_stream_or_the_buffers_of_its_connection_once_it_was_aborted() -> None:
    """Not even until garbage is looked for: the buffers of one connection are half a megabyte."""
    async with listening() as (listener, dialler, address):
        gc.collect()
        before = kept()
        gc.disable()
        try:
            for _ in range(3):
                stream = await dialler.open_stream(address)
                await round_trip(stream)
                stream.abort("enough")
                del stream
                await settle(lambda: not len(listener._connections) and not len(dialler._connections))
            await settle(lambda: kept() == before)
        finally:
            gc.enable()
