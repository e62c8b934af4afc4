"""How fast transports are between two processes of one machine, in turns, beside their yardsticks."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import attrs
from rich.table import Table

from swarmcore.bench.contender import (
    Contender,
    Figure,
    Yardstick,
    contenders,
    figures_table,
    place_at,
    yardstick_of,
)
from swarmcore.bench.transport_peer import SINK, answer, echo_seconds, second_process, usage
from swarmcore.identity import Identity
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.transport import Stream, Transport
from swarmcore.types import Address, Progress

_KB, _MB = 1024, 2**20
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


@attrs.define
class _Measured:
    """A contender under measurement: this process's end, and what it knows of the other's."""

    make: Callable[[], Transport]
    address: Address
    shared: bool
    """Whether both ends are in this process."""
    yardstick: Yardstick | None = None
    yardstick_place: str = ""
    samples: dict[tuple[str, str], list[float]] = attrs.Factory(dict)

    def add(self, name: str, unit: str, value: float) -> None:
        self.samples.setdefault((name, unit), []).append(value)

    def figures(self) -> list[Figure]:
        return [
            Figure(name, statistics.median(values), unit) for (name, unit), values in self.samples.items()
        ]


async def bench_transports(
    names: Sequence[str],
    effort: Effort | None = None,
    *,
    place: str = "",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, list[Figure]]:
    """Measure the installed transports ``names``, and ``"memory"``, the one of the tests, in turns.

    A name is a scheme or, for one of several engines, ``"scheme:engine"``. ``place`` is where the second
    process listens, for one transport in its own notation; loopback by default. CPU times are those of both
    processes. Raise `UnknownTransportError` or `MissingExtraError` when there is no such transport,
    `InputError` when it has no such engine, or for a place with several transports. ``progress`` counts the
    turns.
    """
    effort = effort or Effort()
    async with contextlib.AsyncExitStack() as stack:
        measured = {
            str(contender): await stack.enter_async_context(_second_end(contender, place))
            for contender in contenders(names, place=place)
        }
        turns = [(name, one) for _ in range(effort.turns) for name, one in measured.items()]
        for done, (name, one) in enumerate(turns):
            progress(f"measuring {name}", done, len(turns))
            await _turn(one, effort)
    return {name: one.figures() for name, one in measured.items()}


def transport_table(results: dict[str, list[Figure]]) -> Table:
    """The figures as people read them: a row each, a column for each transport."""
    schemes = dict.fromkeys(Contender.parse(name).scheme for name in results)
    yardsticks = [(scheme, yardstick_of(scheme)) for scheme in schemes]
    return figures_table(
        results,
        title="transports, two processes on one machine",
        caption="; ".join(f"{scheme}'s yardstick: a {found.name}" for scheme, found in yardsticks if found),
    )


@contextlib.asynccontextmanager
async def _second_end(contender: Contender, place: str) -> AsyncIterator[_Measured]:
    if contender.scheme == "memory":
        network = MemoryNetwork()
        listener = network.transport(Identity.generate())
        address = (await listener.listen(answer))[0]
        try:
            yield _Measured(lambda: network.transport(Identity.generate(), listen=False), address, True)
        finally:
            await listener.close()
        return
    await contender.make().close()  # what is wrong with it is better said here than by the other process
    place = place or place_at(contender.scheme, "127.0.0.1")
    async with second_process(contender, place, _start) as (address, yardstick_place):
        yardstick = yardstick_of(contender.scheme) if yardstick_place else None
        yield _Measured(contender.make, address, False, yardstick, yardstick_place)


async def _start(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=PIPE, stdout=PIPE)


async def _turn(measured: _Measured, effort: Effort) -> None:
    transport = measured.make()
    try:
        started = time.perf_counter()
        stream = await transport.open_stream(measured.address)
        await usage(stream)
        measured.add("connect, until the first answer", "ms", 1e3 * (time.perf_counter() - started))
        for name in ("4 KB", "64 KB"):
            await _round_trips(measured, stream, name, effort.round_trips)
        for name in ("64 KB", "1 MiB"):
            await _rate(measured, stream, name, max(1, effort.megabytes * _MB // _SIZES[name]))
        await _streams(measured, transport, stream, effort.streams)
        await stream.close()
    finally:
        await transport.close()


async def _round_trips(measured: _Measured, stream: Stream, name: str, count: int) -> None:
    times = await echo_seconds(stream, _SIZES[name], count)
    ours = 1e3 * statistics.median(times)
    measured.add(f"{name} round trip, median", "ms", ours)
    measured.add(f"{name} round trip, 95th percentile", "ms", 1e3 * statistics.quantiles(times, n=20)[-1])
    if yardstick := measured.yardstick:
        bare = await asyncio.to_thread(yardstick.round_trips, measured.yardstick_place, _SIZES[name], count)
        measured.add(
            f"{name} round trip, added to the yardstick's", "ms", ours - 1e3 * statistics.median(bare)
        )


async def _rate(measured: _Measured, stream: Stream, name: str, count: int) -> None:
    size = _SIZES[name]
    body = memoryview(bytearray(size - 1))
    before, cpu = await usage(stream), time.process_time()
    started = time.perf_counter()
    for _ in range(count):
        await stream.send(SINK, body)
    after = await usage(stream)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    rate = size * count / seconds
    measured.add(f"{name} messages", "MB/s", rate / 1e6)
    both = cpu if measured.shared else cpu + after[0] - before[0]
    measured.add(f"{name} messages, CPU of both sides", "ms/MB", 1e3 * both / (size * count / 1e6))
    if yardstick := measured.yardstick:
        bare = await asyncio.to_thread(yardstick.rate, measured.yardstick_place, size, count)
        measured.add(f"{name} messages, over the yardstick's", "ratio", rate / bare)


async def _streams(measured: _Measured, transport: Transport, control: Stream, count: int) -> None:
    """Streams to a known peer: each closed before the next, then all of them kept open."""

    async def opened() -> Stream:
        stream = await transport.open_stream(measured.address)
        await usage(stream)
        return stream

    async def one_by_one() -> None:
        for _ in range(count):
            await (await opened()).close()

    held: list[Stream] = []

    async def side_by_side() -> None:
        for _ in range(count):
            held.append(await opened())

    before = await usage(control)
    measured.add("another stream, the last one closed", "ms", await _milliseconds(one_by_one) / count)
    measured.add("another stream, the others open", "ms", await _milliseconds(side_by_side) / count)
    memory = (await usage(control))[1] - before[1]
    if not measured.shared:
        measured.add("memory of the other side for an open stream", "KB", max(0.0, memory / count / _KB))
    for stream in held:
        await stream.close()


async def _milliseconds(work: Callable[[], Awaitable[None]]) -> float:
    started = time.perf_counter()
    await work()
    return 1e3 * (time.perf_counter() - started)
