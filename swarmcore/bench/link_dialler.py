"""One end of a measured link: ``python -m swarmcore.bench.link_dialler EFFORT CONTENDER ADDRESS …``.

It measures the contenders in turns, each to its own address; each turn is a line of JSON, a `Turn`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping

import attrs

from swarmcore.bench.contender import Contender
from swarmcore.bench.transport_peer import SINK, echo_seconds, usage
from swarmcore.transport import Stream
from swarmcore.types import Address

SIZES = {"16 KB": 16 * 1024, "256 KB": 256 * 1024}
"""Of the echoes."""

_MESSAGE = 64 * 1024


@attrs.frozen
class LinkEffort:
    """How much is measured."""

    turns: int = 5
    """How often each contender has its turn, over a new connection each time."""
    echoes: Mapping[str, int] = attrs.field(factory=lambda: {"16 KB": 100, "256 KB": 30})
    """How many of each of `SIZES` in a turn."""
    echo_seconds: float = 10.0
    """For all of a size in a turn: over a bad link it may be fewer."""
    stream_seconds: float = 3.0
    """How long messages are sent one after the other, for a rate; 0 for none."""


@attrs.frozen
class Turn:
    """What one turn of one contender has shown. Times are in seconds."""

    contender: str
    connect: float
    """Until the first answer."""
    echoes: dict[str, list[float]]
    """The time of each, by size."""
    rate: float
    """Bytes per second to the other side; 0 if not measured."""


async def turn(contender: Contender, address: Address, effort: LinkEffort) -> Turn:
    """Connect anew and measure."""
    transport = contender.make()
    try:
        started = time.perf_counter()
        stream = await transport.open_stream(address)
        await usage(stream)
        connected = time.perf_counter() - started
        echoes = {
            name: await echo_seconds(stream, size, effort.echoes[name], at_most=effort.echo_seconds)
            for name, size in SIZES.items()
        }
        rate = await _rate(stream, effort.stream_seconds) if effort.stream_seconds else 0.0
        await stream.close()
    finally:
        await transport.close()
    return Turn(str(contender), connected, echoes, rate)


async def _rate(stream: Stream, seconds: float) -> float:
    body = memoryview(bytearray(_MESSAGE - 1))
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        await stream.send(SINK, body)
        count += 1
    await usage(stream)
    return _MESSAGE * count / (time.perf_counter() - started)


async def main(effort_json: str, *arguments: str) -> None:
    effort = LinkEffort(**json.loads(effort_json))
    pairs = [
        (Contender.parse(name), Address.parse(address))
        for name, address in zip(arguments[::2], arguments[1::2], strict=True)
    ]
    for _ in range(effort.turns):
        for contender, address in pairs:
            json.dump(attrs.asdict(await turn(contender, address, effort)), sys.stdout)
            sys.stdout.write("\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
