"""What transports do between two hosts far from each other, in turns, and beside TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
from collections.abc import Sequence

import attrs
from rich.table import Table

from swarmcore.bench.contender import Figure, contenders, figures_table, place_at
from swarmcore.bench.link_dialler import SIZES, LinkEffort, Turn
from swarmcore.bench.link_pump import LEFT, RIGHT, Carried
from swarmcore.bench.long_link import CONGESTION_CONTROL, Link, LongLink, long_link
from swarmcore.bench.transport_peer import second_process
from swarmcore.errors import InputError, RemoteFaultError
from swarmcore.types import Progress

_TURN_TIMEOUT = 180.0
_LINE_LIMIT = 2**20


@attrs.frozen
class LinkReport:
    """What was found."""

    figures: dict[str, list[Figure]]
    """By contender."""
    carried: Carried | None
    """What the emulated link did meanwhile; None when it broke."""


async def bench_over_link(
    names: Sequence[str],
    link: Link,
    effort: LinkEffort | None = None,
    *,
    place: str = "",
    progress: Progress = lambda what, done, total: None,
) -> LinkReport:
    """Measure the installed transports ``names`` in turns, between two hosts joined by ``link``.

    Names, ``place`` and ``progress`` are as those of `bench_transports`. Raise what that raises, and
    `UnavailableError` where no link can be emulated.
    """
    effort = effort or LinkEffort()
    found = contenders(names, place=place)
    for contender in found:
        if contender.scheme == "memory":
            raise InputError("memory is within one process and passes no link; leave it out")
        await contender.make().close()  # what is wrong with it is better said here than by other processes
    async with long_link(link) as network, contextlib.AsyncExitStack() as stack:
        arguments: list[str] = []
        for contender in found:
            where = place or place_at(contender.scheme, network.address(RIGHT))
            listening = second_process(contender, where, lambda *argv: network.run(RIGHT, *argv))
            address, _ = await stack.enter_async_context(listening)
            arguments += [str(contender), str(address)]
        turns = await _turns(network, effort, arguments, progress)
    return LinkReport(figures_of(turns), network.carried)


async def _turns(
    network: LongLink, effort: LinkEffort, arguments: Sequence[str], progress: Progress
) -> list[Turn]:
    command = ("-m", "swarmcore.bench.link_dialler", json.dumps(attrs.asdict(effort)), *arguments)
    dialler = await network.run(LEFT, *command, limit=_LINE_LIMIT)
    assert dialler.stdout
    turns: list[Turn] = []
    expected = effort.turns * len(arguments) // 2
    while len(turns) < expected:
        progress("measuring over the link", len(turns), expected)
        line = await asyncio.wait_for(dialler.stdout.readline(), _TURN_TIMEOUT)
        if not line:
            raise RemoteFaultError("the benchmark's dialling process ended early; its message is above")
        turns.append(Turn(**json.loads(line)))
    return turns


def figures_of(turns: Sequence[Turn]) -> dict[str, list[Figure]]:
    """The figures of each contender, with ratios to those of tcp where it is one of them.

    Every echo of every turn counts, as the late ones are few; of connects and rates the median does.
    """
    names = dict.fromkeys(turn.contender for turn in turns)
    figures = {name: _figures_of_one([turn for turn in turns if turn.contender == name]) for name in names}
    if "tcp" in figures and len(figures) > 1:
        ours = {figure.name: figure.value for figure in figures["tcp"]}
        for name in figures.keys() - {"tcp"}:
            figures[name] = [
                one
                for figure in figures[name]
                for one in (
                    figure,
                    Figure(f"{figure.name}, over tcp's", figure.value / ours[figure.name], "ratio"),
                )
            ]
    return figures


def _figures_of_one(turns: Sequence[Turn]) -> list[Figure]:
    figures = [
        Figure(
            "connect, until the first answer", 1e3 * statistics.median(turn.connect for turn in turns), "ms"
        )
    ]
    for size in SIZES:
        times = [1e3 * seconds for turn in turns for seconds in turn.echoes[size]]
        figures.append(Figure(f"{size} echo, median", statistics.median(times), "ms"))
        figures.append(Figure(f"{size} echo, 99th percentile", percentile(times, 99), "ms"))
    if rate := statistics.median(turn.rate for turn in turns):
        figures.append(Figure("64 KB messages", rate / 1e6, "MB/s"))
    return figures


def percentile(values: Sequence[float], percent: int) -> float:
    """The least of ``values`` that ``percent`` of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def link_table(link: Link, report: LinkReport) -> Table:
    """The figures as people read them, and whether the link was what it was to be."""
    caption = f"TCP is the kernel's, with {CONGESTION_CONTROL}"
    if done := report.carried:
        caption += (
            f"; the emulated link carried {done.packets:,} packets, lost {done.lost:,}, had no room for "
            f"{done.dropped:,}, and was over a millisecond late with {done.late:,}"
        )
    return figures_table(report.figures, title=f"transports over a link: {link}", caption=caption)
