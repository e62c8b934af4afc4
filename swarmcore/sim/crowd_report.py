"""What came of a crowd's hour, for people, for programs and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.sim.hosts import Host
from swarmcore.sim.scenario import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from swarmcore.sim.crowd import Crowd, _Hour

SOON = 5.0
"""Seconds after which no view should show the victims of the disaster."""

_QUANTILES = (0.5, 0.9, 0.99)


def crowd_report(crowd: Crowd, hour: _Hour, report: Report) -> None:
    """Fill in what was measured."""
    recoveries = sorted(recovery.seconds for recovery in hour.recoveries)
    servers = [_registry_bytes(server.host) / crowd.seconds for server in hour.servers]
    clients = [_registry_bytes(client.host) / crowd.seconds for client in hour.clients]
    report.goals["no session gave up while every block had a holder"] = not report.problems
    if hour.cleaning.servers or hour.cleaning.never:
        seen_last = max((*hour.cleaning.servers, *hour.cleaning.clients), default=0.0)
        report.goals[f"the dead were gone from every view within {SOON:g} s"] = (
            not hour.cleaning.never and seen_last <= SOON
        )
    report.data.update(
        finished=hour.finished,
        killed=hour.killed,
        recoveries=[attrs.asdict(recovery) for recovery in hour.recoveries],
        failovers=hour.failovers,
        usual_step=statistics.median(hour.steps) if hour.steps else None,
        clean_after={"servers": sorted(hour.cleaning.servers), "clients": sorted(hour.cleaning.clients)},
        never_clean=hour.cleaning.never,
        registry_bytes_per_second={
            "server": {"mean": statistics.fmean(servers), "most": max(servers)},
            "client": {"mean": statistics.fmean(clients), "most": max(clients)},
        },
    )
    table = Table(
        title=f"{crowd.servers} servers, {crowd.clients} clients, {crowd.seconds} s",
        title_justify="left",
        show_header=False,
    )
    table.add_row("generations that came to their end", str(hour.finished))
    table.add_row("servers killed", str(hour.killed))
    for whose, times in (("servers", hour.cleaning.servers), ("clients", hour.cleaning.clients)):
        table.add_row(f"views of {whose} rid of the dead after", _spread(sorted(times)))
    table.add_row("views that never were", str(hour.cleaning.never))
    table.add_row("step without a failure, median", _seconds(report.data["usual_step"]))
    table.add_row("steps in which servers were lost", str(len(recoveries)))
    for quantile in _QUANTILES:
        table.add_row(
            f"  seconds such a step took, {quantile:.0%}", _seconds(_quantile(recoveries, quantile))
        )
    table.add_row("  the longest", _seconds(recoveries[-1] if recoveries else None))
    table.add_row("registry traffic of a server, in and out", _traffic(servers))
    table.add_row("registry traffic of a client", _traffic(clients))
    report.tables.append(table)
    report.plot = partial(_plot, recoveries, report.data["usual_step"])


def _registry_bytes(host: Host) -> int:
    """Bytes that a host has sent and received for its registry."""
    return sum(
        size
        for counter in (host.sent, host.received)
        for method, size in counter.items()
        if method.startswith(("/swarmcore/gossip/", "/swarmcore/registry/", "/swarmcore/alive/"))
    )


def _quantile(ordered: Sequence[float], part: float) -> float | None:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else None


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"


def _spread(ordered: Sequence[float]) -> str:
    if not ordered:
        return "none"
    return f"{_quantile(ordered, 0.5):.1f} s (half of them), {ordered[-1]:.1f} s (all)"


def _traffic(rates: Sequence[float]) -> str:
    return f"{statistics.fmean(rates):,.0f} B/s on average, {max(rates):,.0f} B/s at most"


def _plot(recoveries: Sequence[float], usual: float | None, figure: Figure) -> None:
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    if recoveries:
        parts = [(index + 1) / len(recoveries) for index in range(len(recoveries))]
        axes.step(recoveries, parts, where="post", label="steps in which servers were lost")
    if usual is not None:
        axes.axvline(usual, color="grey", linestyle="--", label="a step without a failure")
    axes.set_xscale("log")
    axes.set_xlabel("seconds from one token to the next")
    axes.set_ylabel("part of the steps")
    axes.set_ylim(0, 1.02)
    axes.legend()
