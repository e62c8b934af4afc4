"""How fast a transport is between two processes of one machine, beside a bare TLS socket in the same run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence

import attrs
from rich.table import Table

from swarmcore.bench.bare_tls import bare_tls_rate
from swarmcore.bench.transport_peer import ECHO, MARK, SINK
from swarmcore.errors import RemoteFaultError
from swarmcore.identity import Identity
from swarmcore.transport import Stream, Transport, transport_class
from swarmcore.types import Address

_START_TIMEOUT = 30.0
_SMALL = 4096
_BIG = 2**20
_TURNS = 7


@attrs.frozen
class TransportResult:
    """One measured figure."""

    name: str
    value: float
    unit: str
    """``"µs"``, ``"MB/s"`` or ``"ratio"``."""


async def bench_transport(
    scheme: str,
    *,
    place: str = "127.0.0.1:0",
    round_trips: int = 2000,
    megabytes: int = 512,
    streams: int = 200,
) -> list[TransportResult]:
    """Measure the installed transport ``scheme`` against a second process that listens on ``place``.

    ``place`` is in the transport's own notation. The 1 MiB messages and the bare TLS socket take turns, and
    the median of seven turns counts, for the ratio that of their ratios. CPU times are those of the whole
    process, per stream opened. Raise `UnknownTransportError` or `MissingExtraError` when there is no such
    transport.
    """
    transport = transport_class(scheme)(Identity.generate())
    try:
        async with _peer(scheme, place) as (address, bare_tls_port):
            return [
                *await _open_first(transport, address),
                *await _round_trips(transport, address, round_trips),
                *await _rates(transport, address, bare_tls_port, megabytes),
                *await _open_more(transport, address, streams),
            ]
    finally:
        await transport.close()


def transport_table(scheme: str, results: Sequence[TransportResult]) -> Table:
    """The figures as people read them."""
    table = Table(title=f"transport {scheme}, two processes on one machine")
    table.add_column("measured")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for result in results:
        digits = 2 if result.unit == "ratio" else 0
        table.add_row(result.name, f"{result.value:,.{digits}f}", result.unit)
    return table


@contextlib.asynccontextmanager
async def _peer(scheme: str, place: str) -> AsyncIterator[tuple[Address, int]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmcore.bench.transport_peer", scheme, place),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT)
        if not line:
            raise RemoteFaultError("the benchmark's second process ended at once; its message is above")
        ready = json.loads(line)
        yield Address.parse(ready["address"]), ready["bare_tls_port"]
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _START_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _open_first(transport: Transport, address: Address) -> list[TransportResult]:
    started = time.perf_counter()
    stream = await transport.open_stream(address)
    await _remote_cpu(stream)
    elapsed = time.perf_counter() - started
    await stream.close()
    return [TransportResult("first stream to a peer, until its first answer", elapsed * 1e6, "µs")]


async def _round_trips(transport: Transport, address: Address, count: int) -> list[TransportResult]:
    message = ECHO + bytes(_SMALL - 1)
    stream = await transport.open_stream(address)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await stream.send(message)
        await stream.receive()
        times.append(time.perf_counter() - started)
    await stream.close()
    quantiles = statistics.quantiles(times, n=20)
    return [
        TransportResult("4 KB round trip, median", statistics.median(times) * 1e6, "µs"),
        TransportResult("4 KB round trip, 95th percentile", quantiles[-1] * 1e6, "µs"),
    ]


async def _rates(
    transport: Transport, address: Address, bare_tls_port: int, megabytes: int
) -> list[TransportResult]:
    count = max(1, megabytes // _TURNS)
    body = memoryview(bytearray(_BIG - 1))
    ours, bare = [], []
    stream = await transport.open_stream(address)
    for _ in range(_TURNS):
        bare.append(await asyncio.to_thread(bare_tls_rate, bare_tls_port, _BIG, count))
        started = time.perf_counter()
        for _ in range(count):
            await stream.send(SINK, body)
        await _remote_cpu(stream)
        ours.append(_BIG * count / (time.perf_counter() - started))
    await stream.close()
    ratio = statistics.median(our / other for our, other in zip(ours, bare, strict=True))
    return [
        TransportResult("1 MiB messages", statistics.median(ours) / 1e6, "MB/s"),
        TransportResult("bare TLS socket", statistics.median(bare) / 1e6, "MB/s"),
        TransportResult("1 MiB messages / bare TLS", ratio, "ratio"),
    ]


async def _open_more(transport: Transport, address: Address, count: int) -> list[TransportResult]:
    """Streams to a known peer: each closed before the next, then all of them kept open."""
    results = []
    control = await transport.open_stream(address)
    for name, keep_open in (("one after the other", False), ("side by side", True)):
        remote, local, started = await _remote_cpu(control), time.process_time(), time.perf_counter()
        opened = []
        for _ in range(count):
            stream = await transport.open_stream(address)
            await _remote_cpu(stream)
            if keep_open:
                opened.append(stream)
            else:
                await stream.close()
        elapsed, local = time.perf_counter() - started, time.process_time() - local
        remote = await _remote_cpu(control) - remote
        results += [
            TransportResult(f"{count} more streams, {name}, each", elapsed / count * 1e6, "µs"),
            TransportResult("· CPU of this side", local / count * 1e6, "µs"),
            TransportResult("· CPU of the other side", remote / count * 1e6, "µs"),
        ]
        for stream in opened:
            await stream.close()
    await control.close()
    return results


async def _remote_cpu(stream: Stream) -> float:
    await stream.send(MARK)
    return float(struct.unpack("<d", await stream.receive())[0])
