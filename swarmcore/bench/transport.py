"""How fast transports are between two processes of one machine, in turns, beside their yardsticks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import attrs
from rich.table import Table

from swarmcore.bench.transport_peer import ECHO, MARK, SINK, USAGE, answer
from swarmcore.bench.yardstick import Yardstick, yardstick_of
from swarmcore.errors import InputError, RemoteFaultError
from swarmcore.identity import Identity
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.transport import Stream, Transport, transport_class
from swarmcore.types import Address

_START_TIMEOUT = 30.0
_KB, _MB = 1024, 2**20
_LOOPBACK = {"tcp": "127.0.0.1:0", "libp2p": "/ip4/127.0.0.1/tcp/0", "webrtc": "127.0.0.1:0"}
_SIZES = {"4 KB": 4 * _KB, "64 KB": 64 * _KB, "1 MiB": _MB}


@attrs.frozen
class Effort:
    """How much is measured."""

    turns: int = 5
    """How often each transport has its turn; the median of its turns counts."""
    round_trips: int = 300
    """Of a turn and a size."""
    megabytes: int = 48
    """Of a turn and a size."""
    streams: int = 100
    """Opened in a turn, once each closed before the next, once side by side."""


@attrs.frozen
class Figure:
    """One measured figure of one transport."""

    name: str
    value: float
    unit: str
    """``"ms"``, ``"MB/s"``, ``"ms/MB"``, ``"KB"`` or ``"ratio"``."""


@attrs.define
class _Contender:
    """A transport under measurement: this process's end, and what it knows of the other's."""

    scheme: str
    make: Callable[[], Transport]
    address: Address
    shared: bool
    """Whether both ends are in this process."""
    yardstick: Yardstick | None
    yardstick_place: str
    samples: dict[tuple[str, str], list[float]] = attrs.Factory(dict)

    def add(self, name: str, unit: str, value: float) -> None:
        self.samples.setdefault((name, unit), []).append(value)

    def figures(self) -> list[Figure]:
        return [
            Figure(name, statistics.median(values), unit) for (name, unit), values in self.samples.items()
        ]


async def bench_transports(
    schemes: Sequence[str], effort: Effort | None = None, *, place: str = ""
) -> dict[str, list[Figure]]:
    """Measure the installed transports ``schemes``, and ``"memory"``, the one of the tests, in turns.

    ``place`` is where the second process listens, for one scheme in its own notation; loopback by default.
    CPU times are those of both processes. Raise `UnknownTransportError` or `MissingExtraError` when there is
    no such transport, `InputError` for a place with several.
    """
    if place and len(schemes) > 1:
        raise InputError(f"{place!r} could be a place of any of {', '.join(schemes)}; measure one at a time")
    effort = effort or Effort()
    async with contextlib.AsyncExitStack() as stack:
        contenders = [await stack.enter_async_context(_contender(scheme, place)) for scheme in schemes]
        for _ in range(effort.turns):
            for contender in contenders:
                await _turn(contender, effort)
    return {contender.scheme: contender.figures() for contender in contenders}


def transport_table(results: dict[str, list[Figure]]) -> Table:
    """The figures as people read them: a row each, a column for each transport."""
    yardsticks = [(scheme, yardstick_of(scheme)) for scheme in results]
    table = Table(
        title="transports, two processes on one machine",
        caption="; ".join(f"{scheme}'s yardstick: a {found.name}" for scheme, found in yardsticks if found),
    )
    table.add_column("measured")
    for scheme in results:
        table.add_column(scheme, justify="right")
    table.add_column("unit")
    rows = {(figure.name, figure.unit): None for figures in results.values() for figure in figures}
    values = {
        (scheme, figure.name): figure.value for scheme, figures in results.items() for figure in figures
    }
    for name, unit in rows:
        cells = [_cell(values.get((scheme, name)), unit) for scheme in results]
        table.add_row(name, *cells, unit)
    return table


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.{0 if unit in ('MB/s', 'KB') else 2}f}"


@contextlib.asynccontextmanager
async def _contender(scheme: str, place: str) -> AsyncIterator[_Contender]:
    if scheme == "memory":
        network = MemoryNetwork()
        listener = network.transport(Identity.generate())
        address = (await listener.listen(answer))[0]
        try:
            yield _Contender(
                scheme, lambda: network.transport(Identity.generate(), listen=False), address, True, None, ""
            )
        finally:
            await listener.close()
        return
    backend = transport_class(scheme)
    async with _peer(scheme, place or _LOOPBACK.get(scheme, "")) as (address, yardstick_place):
        yield _Contender(
            scheme,
            lambda: backend(Identity.generate()),
            address,
            False,
            yardstick_of(scheme) if yardstick_place else None,
            yardstick_place,
        )


@contextlib.asynccontextmanager
async def _peer(scheme: str, place: str) -> AsyncIterator[tuple[Address, str]]:
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
        yield Address.parse(ready["address"]), ready["yardstick"] or ""
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _START_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _turn(contender: _Contender, effort: Effort) -> None:
    transport = contender.make()
    try:
        started = time.perf_counter()
        stream = await transport.open_stream(contender.address)
        await _usage(stream)
        contender.add("connect, until the first answer", "ms", 1e3 * (time.perf_counter() - started))
        for name in ("4 KB", "64 KB"):
            await _round_trips(contender, stream, name, effort.round_trips)
        for name in ("64 KB", "1 MiB"):
            await _rate(contender, stream, name, max(1, effort.megabytes * _MB // _SIZES[name]))
        await _streams(contender, transport, stream, effort.streams)
        await stream.close()
    finally:
        await transport.close()


async def _round_trips(contender: _Contender, stream: Stream, name: str, count: int) -> None:
    message = ECHO + bytes(_SIZES[name] - 1)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await stream.send(message)
        await stream.receive()
        times.append(time.perf_counter() - started)
    ours = 1e3 * statistics.median(times)
    contender.add(f"{name} round trip, median", "ms", ours)
    contender.add(f"{name} round trip, 95th percentile", "ms", 1e3 * statistics.quantiles(times, n=20)[-1])
    if yardstick := contender.yardstick:
        bare = await asyncio.to_thread(yardstick.round_trips, contender.yardstick_place, _SIZES[name], count)
        contender.add(
            f"{name} round trip, added to the yardstick's", "ms", ours - 1e3 * statistics.median(bare)
        )


async def _rate(contender: _Contender, stream: Stream, name: str, count: int) -> None:
    size = _SIZES[name]
    body = memoryview(bytearray(size - 1))
    before, cpu = await _usage(stream), time.process_time()
    started = time.perf_counter()
    for _ in range(count):
        await stream.send(SINK, body)
    after = await _usage(stream)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    rate = size * count / seconds
    contender.add(f"{name} messages", "MB/s", rate / 1e6)
    both = cpu if contender.shared else cpu + after[0] - before[0]
    contender.add(f"{name} messages, CPU of both sides", "ms/MB", 1e3 * both / (size * count / 1e6))
    if yardstick := contender.yardstick:
        bare = await asyncio.to_thread(yardstick.rate, contender.yardstick_place, size, count)
        contender.add(f"{name} messages, over the yardstick's", "ratio", rate / bare)


async def _streams(contender: _Contender, transport: Transport, control: Stream, count: int) -> None:
    """Streams to a known peer: each closed before the next, then all of them kept open."""

    async def opened() -> Stream:
        stream = await transport.open_stream(contender.address)
        await _usage(stream)
        return stream

    async def one_by_one() -> None:
        for _ in range(count):
            await (await opened()).close()

    held: list[Stream] = []

    async def side_by_side() -> None:
        for _ in range(count):
            held.append(await opened())

    before = await _usage(control)
    contender.add("another stream, the last one closed", "ms", await _milliseconds(one_by_one) / count)
    contender.add("another stream, the others open", "ms", await _milliseconds(side_by_side) / count)
    memory = (await _usage(control))[1] - before[1]
    if not contender.shared:
        contender.add("memory of the other side for an open stream", "KB", max(0.0, memory / count / _KB))
    for stream in held:
        await stream.close()


async def _milliseconds(work: Callable[[], Awaitable[None]]) -> float:
    started = time.perf_counter()
    await work()
    return 1e3 * (time.perf_counter() - started)


async def _usage(stream: Stream) -> tuple[float, int]:
    await stream.send(MARK)
    cpu, memory = USAGE.unpack(await stream.receive())
    return cpu, memory
