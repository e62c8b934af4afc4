"""What a swarm can carry through each block, as far as its servers' announcements tell."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable

import attrs

from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

GRAIN = 1024
"""Throughputs are counted in multiples of 1 / GRAIN tokens/s: their sums are then exact, in any order."""

MOST = 1e9
"""Tokens/s that one server is believed to carry at most; below it ten thousand servers add up exactly."""


@attrs.frozen
class Placement:
    """Where a server is, or is going, and the tokens per second that it carries through these blocks."""

    peer: PeerId
    span: Span
    throughput: float


def placements(
    view: SwarmView,
    model: ModelInfo,
    *,
    without: PeerId | None = None,
    staying: Collection[PeerId] = (),
) -> list[Placement]:
    """Where the servers of ``model`` count for placement.

    Those that join count as if they were online, those that move as if they were there already, except
    the peers in ``staying``, which count where they are. Those that drain, and the peer ``without``, do not
    count. A server that does not tell its throughput counts as the middling one of those that do.
    """
    servers = [
        server
        for server in view.serving(model.fingerprint)
        if server.state != "draining" and server.peer != without
    ]
    told = [server.throughput for server in servers if server.throughput > 0]
    middling = statistics.median(told) if told else 1.0
    found = []
    for server in servers:
        span = server.span if server.peer in staying else server.target or server.span
        if span is not None and (held := _within(span, model.blocks)) is not None:
            throughput = server.throughput if server.throughput > 0 else middling
            found.append(Placement(server.peer, held, _exact(throughput)))
    return found


def present_placement(server: ServerInfo, others: Collection[Placement]) -> Placement:
    """Where ``server`` is now, with a throughput like that of the ``others`` when its own is not known."""
    assert server.span is not None
    throughput = server.throughput
    if throughput <= 0:
        throughput = statistics.median(each.throughput for each in others) if others else 1.0
    return Placement(server.peer, server.span, _exact(throughput))


def block_throughputs(placed: Iterable[Placement], blocks: int) -> list[float]:
    """Tokens per second through each of ``blocks`` blocks, all servers that hold it together."""
    changes = [0.0] * (blocks + 1)
    for placement in placed:
        changes[placement.span.start] += placement.throughput
        changes[placement.span.end] -= placement.throughput
    total, throughputs = 0.0, []
    for change in changes[:-1]:
        total += change
        throughputs.append(total)
    return throughputs


def add(throughputs: list[float], span: Span, throughput: float) -> None:
    """Let a server join the blocks ``span``, or leave them with a negative ``throughput``; in place."""
    for block in range(span.start, span.end):
        throughputs[block] += throughput


def mean_throughput(placed: Iterable[Placement], blocks: int) -> float:
    """Tokens per second if the servers' work could be shared out evenly: no arrangement gives more."""
    return sum(each.throughput * len(each.span) for each in placed) / blocks


def unique_blocks(view: SwarmView, server: ServerInfo) -> Span | None:
    """From the first to the last of ``server``'s blocks that no one else holds, None when others hold all.

    Others are the servers that are online and are not about to leave the block for another one.
    """
    assert server.model is not None
    assert server.span is not None
    others = [
        other
        for other in view.serving(server.model.fingerprint)
        if other.peer != server.peer and other.state == "online" and other.span is not None
    ]
    alone = [
        block
        for block in range(server.span.start, server.span.end)
        if not any(
            block in other.span and (other.target is None or block in other.target)
            for other in others
            if other.span
        )
    ]
    return Span(alone[0], alone[-1] + 1) if alone else None


def _exact(throughput: float) -> float:
    """The nearest multiple of 1 / `GRAIN`, above 0."""
    return max(1, round(min(throughput, MOST) * GRAIN)) / GRAIN


def _within(span: Span, blocks: int) -> Span | None:
    """The part of ``span`` that the model has: some may announce more blocks with the same fingerprint."""
    held = Span(max(span.start, 0), min(span.end, blocks))
    return held if held.start < held.end else None
