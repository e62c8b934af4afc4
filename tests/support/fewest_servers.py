"""A router of a few lines, whose chains are easy to foresee."""

from __future__ import annotations

import random
from collections.abc import Collection

from swarmcore.registry.base import SwarmView
from swarmcore.routing.base import Router
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.coverage import Bans, explain_missing, missing_ranges, reprieved
from swarmcore.types import ModelInfo, PeerId, Span


class FewestServers(Router):
    """Covers a span with as few servers as possible; among equals prefers room in the cache, then chance.

    ``allowed``, when given, are the only servers considered.
    """

    def __init__(self, rng: random.Random, *, allowed: Collection[PeerId] | None = None) -> None:
        self._rng = rng
        self._allowed = allowed

    def plan(
        self,
        view: SwarmView,
        model: ModelInfo,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        banned: Bans = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        usable = [
            server
            for server in view.serving(model.fingerprint)
            if server.state == "online"
            and server.peer not in blocked
            and (self._allowed is None or server.peer in self._allowed)
        ]
        trusted = [server for server in usable if server.peer not in banned]
        suspects = [server for server in usable if server.peer in banned]
        scarce = missing_ranges((s.span for s in trusted if s.span), span)
        last_resort = reprieved(suspects, [b for part in scarce for b in part], banned)
        missing = [
            gap for part in scarce for gap in missing_ranges((s.span for s in last_resort if s.span), part)
        ]
        if missing:
            raise explain_missing(view, model, missing)
        self._rng.shuffle(trusted)
        stages = []
        position = span.start
        while position < span.end:
            part = next((part for part in scarce if position in part), None)
            limit = (
                part.end if part else min((p.start for p in scarce if p.start > position), default=span.end)
            )
            # Greedy from the left is optimal for interval cover.
            server, reach = max(
                (
                    (s, s.span.end)
                    for s in (last_resort if part else trusted)
                    if s.span and position in s.span
                ),
                key=lambda found: (min(found[1], limit), found[0].cache_tokens_free >= tokens),
            )
            end = min(reach, limit)
            stages.append(Stage(server, Span(position, end)))
            position = end
        return Chain(tuple(stages))
