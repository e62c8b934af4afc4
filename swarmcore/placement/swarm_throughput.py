"""What a swarm can carry through each block, as far as its servers' announcements tell."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence

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
    keeps: Span | None = None
    """Of its blocks those that it cannot leave now; all of them when it cannot move."""
    lost: float = 0.0
    """Tokens, through the whole model, that others would have to compute again if it moved."""
    start_step: int = 1
    """Its span begins at a multiple of this many blocks."""


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
    count. A server that does not tell its throughput counts as the median of those that do.
    """
    servers = [
        server
        for server in view.serving(model.fingerprint)
        if server.state != "draining" and server.peer != without
    ]
    keeping = unique_blocks(servers, model.blocks)
    stated = [server.throughput for server in servers if server.throughput > 0]
    median = statistics.median(stated) if stated else 1.0
    found = []
    for server in servers:
        span = server.span if server.peer in staying else server.target or server.span
        if span is not None and (held := model.span.overlap(span)) is not None:
            throughput = server.throughput if server.throughput > 0 else median
            settled = server.state == "online" and (server.target is None or server.peer in staying)
            keeps = keeping.get(server.peer) if settled and not server.pinned else held
            lost, step = _lost(server, held, model.blocks), max(server.start_step, 1)
            found.append(Placement(server.peer, held, _exact(throughput), keeps, lost, step))
    return found


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
    for block in span:
        throughputs[block] += throughput


def mean_throughput(placed: Iterable[Placement], blocks: int) -> float:
    """Tokens per second if the servers' work could be shared out evenly: no arrangement gives more."""
    return sum(each.throughput * len(each.span) for each in placed) / blocks


def unique_blocks(servers: Sequence[ServerInfo], blocks: int) -> dict[PeerId, Span]:
    """For servers with blocks that no one else holds: from the first to the last of these.

    Someone else holds a block who is online and is not about to leave it for another one.
    """
    whole = Span(0, blocks)
    held = {}
    for server in servers:
        if server.span is not None and (span := server.span.overlap(whole)) is not None:
            held[server.peer] = span
    lasting = [0] * blocks
    for server in servers:
        if server.state == "online" and server.peer in held:
            for block in _lasting(server, held[server.peer]) or ():
                lasting[block] += 1
    unique = {}
    for server in servers:
        if server.peer not in held:
            continue
        own = _lasting(server, held[server.peer]) if server.state == "online" else None
        alone = [block for block in held[server.peer] if lasting[block] <= (own is not None and block in own)]
        if alone:
            unique[server.peer] = Span(alone[0], alone[-1] + 1)
    return unique


def _lasting(server: ServerInfo, held: Span) -> Span | None:
    """The blocks that it holds and will hold."""
    return held if server.target is None else held.overlap(server.target)


def _lost(server: ServerInfo, span: Span, blocks: int) -> float:
    return max(0, server.cache_tokens - server.cache_tokens_free) * len(span) / blocks


def _exact(throughput: float) -> float:
    """The nearest multiple of 1 / `GRAIN`, above 0."""
    return max(1, round(min(throughput, MOST) * GRAIN)) / GRAIN
