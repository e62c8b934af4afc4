"""The state of a swarm, as plain values for programs and as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, Numerics, PeerId, ServerInfo, Span, short

Diagnostics = Mapping[PeerId, Sequence[str]]
"""A few lines of each server that was asked."""

RoundTrips = Mapping[PeerId, float]
"""Seconds to peers and back."""

_BAR_WIDTH = 40
_SERVER_BAR_WIDTH = 8
_LEVELS = "·▂▄▆█"
_ASCII_LEVELS = ".1234"
_STATE_STYLES = {"online": "green", "joining": "yellow", "draining": "magenta"}


def describe(
    view: SwarmView, diagnostics: Diagnostics, paths: Mapping[PeerId, str], trips: RoundTrips | None = None
) -> dict[str, Any]:
    """The view, what the servers said, and how each was reached, as plain values for JSON.

    With ``trips`` also the seconds to each peer and back.
    """
    models = []
    for fingerprint, model in sorted(view.models().items()):
        counts = _coverage_online(view, model)
        models.append(
            {
                "name": model.name,
                "fingerprint": fingerprint,
                "source": model.source,
                "blocks": model.blocks,
                "coverage": counts,
                "missing": [str(span) for span in uncovered(counts)],
            }
        )
    servers = [
        {
            **_server_values(server, diagnostics),
            "path": paths.get(server.peer),
            **({"round_trip": trips.get(server.peer)} if trips is not None else {}),
        }
        for server in sorted(view, key=_by_span)
    ]
    runs = [
        {"name": name, "members": [member.peer for member in members]}
        for name, members in view.runs().items()
    ]
    return {"models": models, "servers": servers, "runs": runs}


def _server_values(server: ServerInfo, diagnostics: Diagnostics) -> dict[str, Any]:
    values = attrs.asdict(server, recurse=False)
    values["model"] = server.model.name if server.model else None
    values["span"] = str(server.span) if server.span else None
    values["numerics"] = str(server.computes) if server.computes else None
    values["target"] = str(server.target) if server.target else None
    values["heads"] = [model.name for model in server.heads]
    values["rtts"] = {rtt.peer: rtt.seconds for rtt in server.rtts}
    values["notes"] = list(diagnostics.get(server.peer, ()))
    return values


def render(
    view: SwarmView, diagnostics: Diagnostics, paths: Mapping[PeerId, str], trips: RoundTrips | None = None
) -> Group:
    """The view as tables: one for each model, with what its servers said; then those who train, by runs,
    those who make texts for others, and the peers that do none of it. How servers compute and how they are
    reached are columns where that differs. With ``trips``, round trips, all that is known of each peer."""
    parts: list[RenderableType] = []
    for model in sorted(view.models().values(), key=lambda m: (m.name, m.fingerprint)):
        servers = view.serving(model.fingerprint)
        parts += [
            _model_line(view, model),
            _server_table(servers, model, paths),
            *_diagnostics(servers, diagnostics),
            Text(),
        ]
    for name, members in view.runs().items():
        how_many = f"{len(members)} member" + ("s" if len(members) > 1 else "")
        parts.append(
            Text.assemble("training run ", (name, "bold"), f", {how_many}: ", (_names(members), "dim"))
        )
    for model, heads in view.heads():
        parts.append(
            Text.assemble("texts of ", (model.name, "bold"), " for thin clients: ", (_names(heads), "dim"))
        )
    without_blocks = [s for s in view if s.span is None and not s.runs and not s.heads]
    if without_blocks:
        parts.append(Text(f"without blocks: {_names(without_blocks)}", style="dim"))
    if trips is not None:
        parts += [_details(server, paths, trips) for server in sorted(view, key=_by_span)]
    if not parts:
        parts.append(Text("nobody serves anything yet"))
    return Group(*parts)


def _model_line(view: SwarmView, model: ModelInfo) -> RenderableType:
    counts = _coverage_online(view, model)
    line = Text.assemble(
        (model.name, "bold"), f"  {model.blocks} blocks  ", (model.fingerprint[:12], "dim"), "  "
    )
    bar = coverage_bar(counts, _BAR_WIDTH)
    line.append(bar, style="green")
    line.highlight_regex("·+", "red")
    missing = uncovered(counts)
    if missing:
        line.append(f"  missing {', '.join(map(str, missing))}", style="bold red")
    else:
        line.append(f"  complete, every block at least {min(counts)} x", style="green")
    if len(numerics := _numerics(view.serving(model.fingerprint))) == 1:
        line.append(f"  {numerics[0]}")
    return line


def _server_table(servers: list[ServerInfo], model: ModelInfo, paths: Mapping[PeerId, str]) -> RenderableType:
    # All but the name keep their width: on a narrow terminal that is what gives way.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for name, width in (("server", 11), ("state", 8), ("blocks", 7), ("", _SERVER_BAR_WIDTH)):
        table.add_column(name, no_wrap=True, min_width=width)
    for name, width in (("sessions", 8), ("tok/s", 6), ("cache", 8)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    if some_differ := len(_numerics(servers)) > 1:
        table.add_column("numerics", no_wrap=True)
    if some_indirect := any(paths.get(server.peer, "direct") != "direct" for server in servers):
        table.add_column("path", no_wrap=True, min_width=len("hole-punched"))
    table.add_column("name", overflow="fold", min_width=len("name"))
    for server in servers:
        assert server.span is not None
        total, free = server.cache_tokens, server.cache_tokens_free
        cache = f"{100 * (total - free) // total} % of {_thousands(total)}" if total else "-"
        state = f"to {server.target}" if server.target else server.state
        table.add_row(
            short(server.peer),
            # Text, not str: what strangers announce is not markup.
            Text(state, style="cyan" if server.target else _STATE_STYLES.get(server.state, "")),
            str(server.span),
            coverage_bar(coverage([server.span], model.blocks), _SERVER_BAR_WIDTH),
            str(server.sessions),
            f"{server.throughput:,.0f}" if server.throughput else "-",
            cache,
            *([_short(server.computes)] if some_differ else []),
            *([paths.get(server.peer, "")] if some_indirect else []),
            Text(server.public_name[:24]),
        )
    return table


def _details(server: ServerInfo, paths: Mapping[PeerId, str], trips: RoundTrips) -> RenderableType:
    """What an operator copies or compares, a line for each."""
    trip = trips.get(server.peer)
    path = paths.get(server.peer)
    speeds = [
        f"decodes {server.decode_rps:,.1f} steps/s" if server.decode_rps else "",
        f"reads {server.forward_rps:,.0f} tokens/s" if server.forward_rps else "",
        f"a step waits {1000 * server.queue_seconds:.1f} ms" if server.queue_seconds else "",
    ]
    lines = [
        f"{server.public_name} · swarmcore {server.version or 'of an unknown version'}".removeprefix(" · "),
        *server.addresses,
        f"round trip {1000 * trip:.1f} ms{f', {path}' if path else ''}" if trip is not None else "no answer",
        ", ".join(filter(None, speeds)),
        f"computes as {server.computes}" if server.computes else "",
        f"can do {', '.join(('inference', *server.capabilities))}" if server.span else "",
        f"from {server.model.source}" if server.model is not None and server.model.source else "",
    ]
    text = Text(str(server.peer), style="bold", overflow="fold")
    for line in filter(None, lines):
        text.append(f"\n  {line}", style="not bold")
    return text


def _diagnostics(servers: list[ServerInfo], diagnostics: Diagnostics) -> list[RenderableType]:
    return [
        Padding(Text(f"{short(server.peer)} {line}", style="dim"), (0, 0, 0, 2))
        for server in servers
        for line in diagnostics.get(server.peer, ())
    ]


def _numerics(servers: list[ServerInfo]) -> list[Numerics]:
    """How they compute, those that say so; each way once."""
    return list(dict.fromkeys(server.computes for server in servers if server.computes))


def _short(numerics: Numerics | None) -> str:
    return f"{numerics.executor}/{numerics.weights}" if numerics else "-"


def _names(servers: list[ServerInfo]) -> str:
    return ", ".join(f"{short(server.peer)} {server.public_name}".strip() for server in servers)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1000}k" if tokens >= 10_000 else str(tokens)


def _coverage_online(view: SwarmView, model: ModelInfo) -> list[int]:
    servers = view.serving(model.fingerprint)
    return coverage((s.span for s in servers if s.span and s.state == "online"), model.blocks)


def _by_span(server: ServerInfo) -> tuple[Span, str]:
    return (server.span or Span(-1, 0), server.peer)


# --- coverage --------------------------------------------------------------------------------------------


def coverage(spans: Iterable[Span], blocks: int) -> list[int]:
    """For each of ``blocks`` blocks the number of spans that hold it. What lies outside is ignored."""
    counts = [0] * blocks
    for span in spans:
        for block in range(span.start, min(span.end, blocks)):
            counts[block] += 1
    return counts


def uncovered(counts: Sequence[int]) -> list[Span]:
    """The ranges of blocks that nobody holds."""
    ranges: list[Span] = []
    for block, count in enumerate(counts):
        if count == 0:
            if ranges and ranges[-1].end == block:
                ranges[-1] = Span(ranges[-1].start, block + 1)
            else:
                ranges.append(Span(block, block + 1))
    return ranges


def coverage_bar(counts: Sequence[int], width: int, encoding: str | None = None) -> str:
    """``counts`` in at most ``width`` characters: · for 0, ▂ 1, ▄ 2, ▆ 3, █ for 4 and more.

    A character that stands for several blocks shows the one that is covered least. Where ``encoding``, by
    default that of stdout, lacks these characters they are ``.`` and the digits 1 to 4.
    """
    levels = _LEVELS
    try:
        levels.encode(encoding or sys.stdout.encoding)
    except UnicodeEncodeError:
        levels = _ASCII_LEVELS
    cells = min(width, len(counts))
    bounds = [cell * len(counts) // cells for cell in range(cells + 1)] if cells else [0]
    lowest = (min(counts[start:end]) for start, end in pairwise(bounds))
    return "".join(levels[min(count, len(levels) - 1)] for count in lowest)
