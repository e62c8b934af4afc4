"""Chains of servers that compute alike, where there are any: servers of other numerics may give another token
at a near tie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial

from swarmcore.errors import MissingBlocksError
from swarmcore.registry.base import SwarmView
from swarmcore.routing.base import Router
from swarmcore.routing.chain import Chain
from swarmcore.routing.coverage import Bans, missing_ranges
from swarmcore.types import ModelInfo, Numerics, PeerId, Span

SLOWER = 1.5
"""Times the latency of the best chain that one of servers that compute alike may have."""

LONGEST_WAIT = 5.0
"""Seconds that may be lost by going on with servers that compute as a session did so far. A token takes less
anywhere: it is the wait for room in caches that is given up."""

MOST_WAYS = 4
"""Numerics that are tried, those of most servers first."""


def plan_alike(
    router: Router,
    view: SwarmView,
    model: ModelInfo,
    span: Span,
    *,
    like: Numerics | None = None,
    tokens: int = 0,
    blocked: Collection[PeerId] = (),
    banned: Bans = (),
    after: PeerId | None = None,
    before: PeerId | None = None,
) -> Chain:
    """A chain as `Router.plan` gives it, of servers of equal numerics if one is there that is good enough.

    With ``like`` it is one of these numerics, as long as no more than `LONGEST_WAIT` is lost by it; without
    it, or where nobody is left who computes so, any that all servers of the chain have, in up to `SLOWER`
    times the latency of the best chain. Banned servers are not used for it. Raises as `Router.plan`.
    """
    plan = partial(router.plan, view, model, span, tokens=tokens, after=after, before=before)

    def seconds(chain: Chain) -> float:
        cost = router.cost(view, model, chain, tokens=tokens, after=after, before=before)
        return cost.seconds if cost is not None else 0.0

    def best_of(ways: Iterable[Numerics | None], limit: float) -> Chain | None:
        found = []
        for way in ways:
            able = [server for server in servers if server.computes == way]
            if missing_ranges((server.span for server in able if server.span), span):
                continue
            out = {*blocked, *banned, *(server.peer for server in servers if server.computes != way)}
            try:
                chain = plan(blocked=out)
            except MissingBlocksError:  # too many hops, say
                continue
            found.append((seconds(chain), chain))
        least, chosen = min(found, key=lambda each: each[0], default=(0.0, None))
        return chosen if least <= limit else None

    best = plan(blocked=blocked, banned=banned)
    if len(best.numerics) == 1 and like in (None, *best.numerics):
        return best
    servers = [
        server
        for server in view.serving(model.fingerprint)
        if server.state == "online" and server.peer not in blocked and server.peer not in banned
    ]
    chosen = best_of([like], seconds(best) + LONGEST_WAIT) if like is not None else None
    if chosen is None and len(best.numerics) > 1:
        usual = Counter(server.computes for server in servers).most_common(MOST_WAYS)
        chosen = best_of((way for way, _ in usual), seconds(best) * SLOWER)
    return chosen or best
