"""``swarmcore status``: who serves which blocks."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import attrs
import click

from swarmcore.cli import interrupt
from swarmcore.cli.coverage import coverage, coverage_bar, uncovered
from swarmcore.cli.options import client_options, load_identity, standard
from swarmcore.cli.output import Output
from swarmcore.types import ModelInfo, ServerInfo, Span, short

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from swarmcore.registry.base import SwarmView

_REFRESH = 0.5  # seconds between two looks at the view
_BAR_WIDTH = 40
_SERVER_BAR_WIDTH = 12
_STATE_STYLES = {"online": "green", "joining": "yellow", "draining": "magenta"}


@click.command()
@client_options
@click.option("--once", is_flag=True, help="Print the present state and leave.")
@standard
def status(output: Output, bootstrap: tuple[str, ...], identity_file: str | None, once: bool) -> None:
    """Show the swarm's servers, their blocks, load and cache, live until Ctrl-C.

    Where stdout is no terminal it prints once. With --json: a line at every change, or one with --once.
    """
    interrupt.run(
        _watch(output, bootstrap, identity_file, once=once or not (sys.stdout.isatty() or output.json_lines)),
        interrupted_status=0,
    )


async def _watch(
    output: Output, bootstrap: tuple[str, ...], identity_file: str | None, *, once: bool
) -> None:
    from rich.console import Console
    from rich.live import Live

    from swarmcore.client.swarm import connect

    async with connect(*bootstrap, identity=load_identity(identity_file)) as swarm:
        view = swarm.view()
        output.event("status", **describe(view))
        if once and not output.json_lines:
            Console().print(render(view))
        if once:
            return
        live = None if output.json_lines else Live(render(view), auto_refresh=False, screen=False)
        try:
            if live:
                live.start(refresh=True)
            while True:
                await asyncio.sleep(_REFRESH)
                seen, view = view.revision, swarm.view()
                if view.revision != seen:
                    output.event("status", **describe(view))
                    if live:
                        live.update(render(view), refresh=True)
        finally:
            if live:
                live.stop()


def describe(view: SwarmView) -> dict[str, Any]:
    """The view as plain values for JSON."""
    models = []
    for fingerprint, model in sorted(view.models().items()):
        counts = _coverage_online(view, model)
        models.append(
            {
                "name": model.name,
                "fingerprint": fingerprint,
                "blocks": model.blocks,
                "coverage": counts,
                "missing": [str(span) for span in uncovered(counts)],
            }
        )
    return {"models": models, "servers": [_server_values(server) for server in sorted(view, key=_by_span)]}


def _server_values(server: ServerInfo) -> dict[str, Any]:
    values = attrs.asdict(server, recurse=False)
    values["model"] = server.model.name if server.model else None
    values["span"] = str(server.span) if server.span else None
    return values


def render(view: SwarmView) -> Group:
    """The view as tables: one for each model, then the peers without blocks."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for model in sorted(view.models().values(), key=lambda m: (m.name, m.fingerprint)):
        parts += [_model_line(view, model), _server_table(view.serving(model.fingerprint), model), Text()]
    without_blocks = [server for server in view if server.span is None]
    if without_blocks:
        names = ", ".join(f"{short(server.peer)} {server.public_name}".strip() for server in without_blocks)
        parts.append(Text(f"without blocks: {names}", style="dim"))
    if not parts:
        parts.append(Text("nobody serves anything yet"))
    return Group(*parts)


def _model_line(view: SwarmView, model: ModelInfo) -> RenderableType:
    from rich.text import Text

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
    return line


def _server_table(servers: list[ServerInfo], model: ModelInfo) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    # All but the name keep their width: on a narrow terminal that is what gives way.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for name, width in (("server", 11), ("state", 8), ("blocks", 7), ("", _SERVER_BAR_WIDTH), ("dtype", 8)):
        table.add_column(name, no_wrap=True, min_width=width)
    table.add_column("sessions", justify="right", no_wrap=True, min_width=8)
    table.add_column("cache", justify="right", no_wrap=True, min_width=15)
    table.add_column("name", overflow="fold")
    for server in servers:
        assert server.span is not None
        total, free = server.cache_tokens, server.cache_tokens_free
        cache = f"{100 * (total - free) // total} % of {total:,}" if total else "-"
        table.add_row(
            short(server.peer),
            # Text, not str: what strangers announce is not markup.
            Text(server.state, style=_STATE_STYLES.get(server.state, "")),
            str(server.span),
            coverage_bar(coverage([server.span], model.blocks), _SERVER_BAR_WIDTH),
            Text(server.dtype),
            str(server.sessions),
            cache,
            Text(server.public_name[:24]),
        )
    return table


def _coverage_online(view: SwarmView, model: ModelInfo) -> list[int]:
    servers = view.serving(model.fingerprint)
    return coverage((s.span for s in servers if s.span and s.state == "online"), model.blocks)


def _by_span(server: ServerInfo) -> tuple[Span, str]:
    return (server.span or Span(-1, 0), server.peer)
