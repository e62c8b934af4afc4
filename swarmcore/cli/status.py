"""``swarmcore status``: who serves which blocks, and who trains together."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import standard
from swarmcore.cli.option_kinds import flag
from swarmcore.cli.options import ClientOptions, client_options
from swarmcore.cli.output import Output, can_redraw
from swarmcore.cli.remote import swarm_of
from swarmcore.errors import SwarmError
from swarmcore.printable import printable_line
from swarmcore.resources import ResourceUse
from swarmcore.rpc.ping import in_turns, measure_round_trip
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import PeerId, ServerInfo

if TYPE_CHECKING:
    from swarmcore.cli.status_view import Diagnostics, RoundTrips
    from swarmcore.client.swarm import Swarm

_REFRESH = 0.5  # seconds between two looks at the view
_ASK_AGAIN = 10.0  # seconds between two rounds of asking the servers what they are about to do

ASK_TIMEOUT = 3.0
"""Seconds that one server gets to answer."""

ASK_AT_ONCE = 16
MOST_ASKED = 256
MOST_LINES = 8
MOST_CHARACTERS = 300


@click.command()
@client_options
@flag("--once", help="Print the present state and leave.")
@flag(
    "-v",
    "--verbose",
    help="Of each peer also its whole id, addresses, version, speeds, the round trip to it, and what others "
    "make it hold.",
)
@standard
def status(output: Output, client: ClientOptions, once: bool, verbose: bool) -> None:
    """Show the swarm's servers, their blocks, load and cache, what they are about to do, and the members of
    training runs, until Ctrl-C.

    Where stdout is no terminal, or a dumb one, it prints once. With --json: a line at every change, or one
    with --once.
    """
    once = once or not (can_redraw(sys.stdout) or output.json_lines)
    interrupt.run(_watch(output, client, once=once, verbose=verbose), interrupted_status=0)


async def _watch(output: Output, client: ClientOptions, *, once: bool, verbose: bool) -> None:
    from rich.live import Live

    from swarmcore.cli.status_view import describe, render
    from swarmcore.cli.terminal import PrintableConsole

    async with swarm_of(client) as swarm:
        view, (diagnostics, trips) = swarm.view(), await _ask(swarm, verbose)
        output.event("status", **describe(view, diagnostics, swarm.paths, trips))
        if once:
            output.table(render(view, diagnostics, swarm.paths, trips))
            return
        live = None
        if not output.json_lines:
            table = render(view, diagnostics, swarm.paths, trips)
            live = Live(table, console=PrintableConsole(), auto_refresh=False, screen=False)
        asking = asyncio.create_task(_ask_later(swarm, verbose))
        try:
            if live:
                live.start(refresh=True)
            while True:
                await asyncio.sleep(_REFRESH)
                seen, view = view.revision, swarm.view()
                before = diagnostics
                if asking.done():
                    diagnostics, trips = asking.result()
                    asking = asyncio.create_task(_ask_later(swarm, verbose))
                if view.revision != seen or diagnostics != before:
                    output.event("status", **describe(view, diagnostics, swarm.paths, trips))
                    if live:
                        live.update(render(view, diagnostics, swarm.paths, trips), refresh=True)
        finally:
            await cancel_and_wait(asking)
            if live:
                live.stop()


async def _ask(swarm: Swarm, verbose: bool) -> tuple[Diagnostics, RoundTrips | None]:
    return await ask_diagnostics(swarm, verbose=verbose), await round_trips(swarm) if verbose else None


async def _ask_later(swarm: Swarm, verbose: bool) -> tuple[Diagnostics, RoundTrips | None]:
    await asyncio.sleep(_ASK_AGAIN)
    return await _ask(swarm, verbose)


async def ask_diagnostics(
    swarm: Swarm, *, verbose: bool = False, timeout: float = ASK_TIMEOUT
) -> Diagnostics:
    """What the servers in the view say that they are about to do, and why, or why they do not answer; of no
    more than `MOST_ASKED` of them.

    What peers make a server hold is told if half of what it has room for is in use, or ``verbose``.
    """
    found: dict[PeerId, Sequence[str]] = {}

    async def ask(server: ServerInfo) -> None:
        try:
            reply = await swarm.info(server.peer, timeout=timeout)
        except SwarmError as exc:
            found[server.peer] = (f"does not answer: {printable_line(str(exc), MOST_CHARACTERS)}",)
            return
        lines = [printable_line(note, MOST_CHARACTERS) for note in reply.notes[:MOST_LINES]]
        uses = reply.resources if verbose else [use for use in reply.resources if 2 * use.used >= use.limit]
        found[server.peer] = [*lines, *([usage(uses)] if uses else [])]

    servers = [server for server in swarm.view() if server.span is not None]
    await in_turns(servers[:MOST_ASKED], ask, at_once=ASK_AT_ONCE)
    return found


async def round_trips(swarm: Swarm, *, timeout: float = ASK_TIMEOUT) -> RoundTrips:
    """Seconds to peers of the view and back, to those that answer; of no more than `MOST_ASKED` of them."""
    found: dict[PeerId, float] = {}

    async def measure(server: ServerInfo) -> None:
        with contextlib.suppress(SwarmError):
            found[server.peer] = await measure_round_trip(swarm.node, server, timeout=timeout)

    await in_turns(list(swarm.view())[:MOST_ASKED], measure, at_once=ASK_AT_ONCE)
    return found


def usage(resources: Sequence[ResourceUse]) -> str:
    """What remote peers make a server hold, in a line."""
    return "held for peers: " + ", ".join(map(_used, resources[:MOST_LINES]))


def _used(use: ResourceUse) -> str:
    if use.resource == "bytes":
        return f"{use.used / 2**20:.0f} of {use.limit / 2**20:.0f} MiB"
    return f"{use.used} of {use.limit} {printable_line(use.resource, MOST_CHARACTERS)}"
