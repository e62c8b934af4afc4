"""The router of interactive sessions: the chain in which a token takes the least time."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from swarmcore.registry.base import SwarmView
from swarmcore.routing.chain import Chain, FewestServers
from swarmcore.routing.coverage import Bans
from swarmcore.types import ModelInfo, PeerId, Span


class LeastLatency:
    """Plans the chain of least expected time for a decode step.

    ``rtts`` are round trips measured by this peer. ``allowed``, when given, are the only servers considered;
    ``blocked_servers`` never are. A chain has at most ``max_hops`` servers.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        rtts: Mapping[PeerId, float] | None = None,
        allowed: Collection[PeerId] | None = None,
        blocked_servers: Collection[PeerId] = (),
        max_hops: int | None = None,
    ) -> None:
        self._fewest = FewestServers(rng, allowed=allowed)
        self._blocked = frozenset(blocked_servers)

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
        """As `Router.plan`."""
        return self._fewest.plan(
            view, model, span, tokens=tokens, blocked={*blocked, *self._blocked}, banned=banned
        )
