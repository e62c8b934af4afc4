"""Work shared out by throughput: for batches, where what all servers do together counts, not one alone.

The interleaved weighted round-robin of SWARM parallelism (arXiv 2301.11913, section 3.2), for servers that
hold spans of any length.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import attrs

from swarmcore.errors import InputError, MissingBlocksError
from swarmcore.routing.chain import Chain, Stage
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span


@attrs.define
class _Share:
    server: ServerInfo
    seconds: float
    """Of one unit of work, such as a token, through its whole span."""
    busy: float
    """Seconds of work given to it so far, and to others before it joined."""


class ThroughputShares:
    """Gives each server work in proportion to its throughput, evenly spread over time.

    Every server has its sum of seconds at work; the next piece goes to the one that would be done with it
    first. Among servers of the same span, at any moment, the numbers of pieces ``n`` and throughputs ``t`` of
    any two satisfy ``|n1/t1 - n2/t2| <= max(1/t1, 1/t2)``. One that joins begins at the others' level, so it
    has nothing to catch up on. A plain object; equal calls give equal chains.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._shares: dict[PeerId, _Share] = {}

    def __repr__(self) -> str:
        return f"<ThroughputShares {len(self._shares)} servers of {self._model.name}>"

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._shares

    def add(self, server: ServerInfo, throughput: float) -> None:
        """Let ``server`` take part, with ``throughput`` units of work a second through its whole span.

        Called again for the same peer, it changes span and throughput from here on.
        """
        if server.span is None or not 0 < throughput < float("inf"):
            raise InputError(f"{server} cannot take a share of the work at a throughput of {throughput}")
        known = self._shares.get(server.peer)
        if known is not None and known.server.span == server.span:
            known.server, known.seconds = server, 1 / throughput
            return
        self.remove(server.peer)
        spans = ((share, share.server.span) for share in self._shares.values())
        rivals = [share.busy for share, span in spans if span and span.overlap(server.span)]
        self._shares[server.peer] = _Share(server, 1 / throughput, min(rivals, default=0.0))

    def remove(self, peer: PeerId) -> None:
        """Harmless when ``peer`` takes no part."""
        self._shares.pop(peer, None)

    def follow(self, servers: Iterable[ServerInfo]) -> None:
        """Take part from now on: the online ones of ``servers``, with the throughput that they announce.

        Those that announce none count like the least of the others.
        """
        online = [
            s
            for s in servers
            if s.state == "online" and s.span and s.model and s.model.fingerprint == self._model.fingerprint
        ]
        least = min((s.throughput for s in online if s.throughput > 0), default=1.0)
        for peer in self._shares.keys() - {server.peer for server in online}:
            self.remove(peer)
        for server in online:
            self.add(server, server.throughput or least)

    def next_chain(self, span: Span, amount: float = 1.0, without: Container[PeerId] = ()) -> Chain:
        """The chain for the next piece of work, of ``amount`` units, which is charged to its servers.

        Those of ``without`` are left out this time; they keep their place among the others. Raise
        `MissingBlocksError` when nobody else holds some block of ``span``; nothing is then charged.
        """
        stages: list[tuple[_Share, Stage, float]] = []
        position = span.start
        while position < span.end:
            offers = []
            for share in self._shares.values():
                held = share.server.span
                if held and position in held and share.server.peer not in without:
                    part = Span(position, min(held.end, span.end))
                    offers.append((share, part, amount * share.seconds * len(part) / len(held)))
            if not offers:
                raise MissingBlocksError(
                    f"no server takes batches through block {position} of {self._model.name}",
                    ranges=[f"{position}:{position + 1}"],
                )
            share, part, seconds = min(
                offers, key=lambda offer: (offer[0].busy + offer[2], offer[0].server.peer)
            )
            stages.append((share, Stage(share.server, part), seconds))
            position = part.end
        for share, _, seconds in stages:
            share.busy += seconds
        return Chain(tuple(stage for _, stage, _ in stages))
