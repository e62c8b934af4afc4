"""What servers say that they are about to do, and why: asked of each of them, for ``swarmcore status``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swarmcore.errors import SwarmError
from swarmcore.printable import printable_line
from swarmcore.resources import ResourceUse
from swarmcore.types import Address, PeerId, ServerInfo
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD

if TYPE_CHECKING:
    from swarmcore.client.swarm import Swarm

Notes = Mapping[PeerId, Sequence[str]]
"""A few lines for each server that was asked."""

RoundTrips = Mapping[PeerId, float]
"""Seconds to peers and back."""

ASK_TIMEOUT = 3.0
"""Seconds that one server gets to answer."""

ASK_AT_ONCE = 16
MOST_ASKED = 256
MOST_NOTES = 8
MOST_CHARACTERS = 300


async def ask(swarm: Swarm, *, verbose: bool = False, timeout: float = ASK_TIMEOUT) -> Notes:
    """The notes of the servers in the view, or why there are none; of no more than `MOST_ASKED` of them.

    What peers make a server hold is told if half of what it has room for is in use, or ``verbose``.
    """
    asked = [server for server in swarm.view() if server.span is not None][:MOST_ASKED]
    room = asyncio.Semaphore(ASK_AT_ONCE)

    async def one(server: ServerInfo) -> Sequence[str]:
        async with room:
            try:
                reply = await swarm.info(server.peer, timeout=timeout)
            except SwarmError as exc:
                return (f"does not answer: {printable_line(str(exc), MOST_CHARACTERS)}",)
        notes = [printable_line(note, MOST_CHARACTERS) for note in reply.notes[:MOST_NOTES]]
        told = reply.resources if verbose else [use for use in reply.resources if 2 * use.used >= use.limit]
        return [*notes, *([usage(told)] if told else [])]

    answers = await asyncio.gather(*map(one, asked))
    return {server.peer: notes for server, notes in zip(asked, answers, strict=True)}


async def round_trips(swarm: Swarm, *, timeout: float = ASK_TIMEOUT) -> RoundTrips:
    """Seconds to peers of the view and back, to those that answer; of no more than `MOST_ASKED` of them."""
    room = asyncio.Semaphore(ASK_AT_ONCE)
    now = asyncio.get_running_loop().time

    async def one(server: ServerInfo) -> float | None:
        addresses = [Address.parse(url) for url in server.addresses]
        async with room:
            try:
                began = 0.0
                for _ in range(2):  # the first may have to connect
                    began = now()
                    await swarm.node.call(addresses, PING_METHOD, Ping(b""), timeout=timeout)
                return now() - began
            except SwarmError:
                return None

    asked = list(swarm.view())[:MOST_ASKED]
    took = await asyncio.gather(*map(one, asked))
    return {server.peer: seconds for server, seconds in zip(asked, took, strict=True) if seconds is not None}


def usage(resources: Sequence[ResourceUse]) -> str:
    """What remote peers make a server hold, in a line."""
    return "held for peers: " + ", ".join(map(_used, resources[:MOST_NOTES]))


def _used(use: ResourceUse) -> str:
    if use.resource == "bytes":
        return f"{use.used / 2**20:.0f} of {use.limit / 2**20:.0f} MiB"
    return f"{use.used} of {use.limit} {printable_line(use.resource, MOST_CHARACTERS)}"
