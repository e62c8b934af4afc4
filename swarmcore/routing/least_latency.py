"""The router of interactive sessions: the chain in which a token takes the least time."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from swarmcore.errors import InputError, MissingBlocksError
from swarmcore.registry.base import SwarmView
from swarmcore.routing.base import Router
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.costs import ChainCost, CostModel, chain_cost, published_rtts
from swarmcore.routing.coverage import Bans, explain_missing, missing_ranges, reprieved
from swarmcore.routing.graph import ServerGraph
from swarmcore.routing.search import Path, Query, shortest_path
from swarmcore.types import ModelInfo, PeerId, Span

TIE = 1e-6
"""Seconds: servers that differ by less are chosen between by chance, so that clients spread over them."""

MODELS = 8
"""Models whose graphs are kept."""


class LeastLatency(Router):
    """Plans the chain in which a decode step takes the least expected time, as `CostModel` sees it.

    The shortest path over (server, position) of arXiv 2312.08361, section 3.2. Any part of a server's span
    may be used, and a server more than once. One without room for the session's tokens costs the wait for it.

    ``allowed``, when given, are the only servers considered; those in ``blocked`` never are. A chain has at
    most ``max_hops`` servers, and so has the replacement for a part of one. What is known of the swarm is
    kept from one call to the next, for up to `MODELS` models, and only differences are taken in.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        costs: CostModel | None = None,
        allowed: Collection[PeerId] | None = None,
        blocked: Collection[PeerId] = (),
        max_hops: int | None = None,
    ) -> None:
        if max_hops is not None and max_hops < 1:
            raise InputError(f"max_hops of {max_hops} leaves no room for a server; it has to be 1 or more")
        self.costs = costs or CostModel()
        self.max_hops = max_hops
        self._rng = rng
        self._allowed = None if allowed is None else frozenset(allowed)
        self._blocked = frozenset(blocked)
        self._graphs: dict[ModelInfo, ServerGraph] = {}

    def __repr__(self) -> str:
        limit = f" at most {self.max_hops} hops" if self.max_hops else ""
        return f"<LeastLatency{limit} {', '.join(map(repr, self._graphs.values()))}>"

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
        """As `Router.plan`; raise `MissingBlocksError` as well when no chain is within ``max_hops``."""
        graph = self._follow(view, model)
        holders, borders = self._holders(graph, view, span, blocked, banned)
        query = self._query(graph, view, span, holders, borders, tokens, after, before)
        path = shortest_path(graph, query)
        assert path is not None  # every block has a holder
        if self.max_hops is not None and _hops(path) > self.max_hops:
            path = shortest_path(graph, query, max_hops=self.max_hops)
            if path is None:
                raise MissingBlocksError(
                    f"no chain of {self.max_hops} servers or fewer covers blocks {span} of {model.name}: "
                    f"{_fewest_hops(graph, query)} are needed; raise max_hops or wait for larger servers",
                    ranges=[str(span)],
                )
        return _chain(graph, path, span.end)

    def cost(
        self,
        view: SwarmView,
        model: ModelInfo,
        chain: Chain,
        *,
        tokens: int = 0,
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> ChainCost:
        """As `Router.cost`, as the chain's servers announce themselves now.

        Servers that have left the view count as they were in ``chain``.
        """
        graph = self._follow(view, model)
        current = Chain(tuple(Stage(view.servers.get(s.server.peer, s.server), s.span) for s in chain.stages))
        return chain_cost(
            self.costs,
            model,
            current,
            typical=graph.typical,
            tokens=tokens,
            after=after,
            before=before,
            published=_published(view, after),
        )

    def prefill_seconds(self, view: SwarmView, model: ModelInfo, chain: Chain, tokens: int) -> float:
        """What ``tokens`` at once, a prompt or a replay, are expected to take through ``chain`` from here."""
        graph = self._follow(view, model)
        servers = [graph.info(slot) for slot in graph.slots.values()]
        typical = self.costs.typical_block_seconds(servers, "prefill")
        cost = self.cost(view, model, chain)
        seconds = cost.return_seconds
        for stage in cost.stages:
            block = self.costs.block_seconds(stage.stage.server, "prefill", typical)
            seconds += stage.network + stage.queue + self.costs.transfer(model, tokens)
            seconds += tokens * len(stage.stage.span) * block
        return seconds

    def _follow(self, view: SwarmView, model: ModelInfo) -> ServerGraph:
        graph = self._graphs.pop(model, None)
        if graph is None:
            if len(self._graphs) >= MODELS:
                del self._graphs[next(iter(self._graphs))]
            graph = ServerGraph(model, self.costs, self.admits)
        self._graphs[model] = graph  # the one used last comes last
        graph.follow(view)
        return graph

    def admits(self, peer: PeerId) -> bool:
        """Whether this router may use the peer at all."""
        return peer not in self._blocked and (self._allowed is None or peer in self._allowed)

    def _holders(
        self,
        graph: ServerGraph,
        view: SwarmView,
        span: Span,
        blocked: Collection[PeerId],
        banned: Bans,
    ) -> tuple[Sequence[Sequence[int]], frozenset[int]]:
        """The slots that may run each block, and where those end that only banned servers hold."""
        shut_out = {graph.slots[peer] for peer in blocked if peer in graph.slots}
        suspects = {graph.slots[peer] for peer in banned if peer in graph.slots} - shut_out
        left_out = shut_out | suspects
        holders = list(graph.holders)
        if left_out:
            for block in span:
                holders[block] = [slot for slot in holders[block] if slot not in left_out]
        scarce = [block for block in span if not holders[block]]
        if not scarce:
            return holders, frozenset()
        last_resort = reprieved([graph.info(slot) for slot in sorted(suspects)], scarce, banned)
        spans = [server.span for server in last_resort if server.span]
        missing = [gap for b in scarce for gap in missing_ranges(spans, Span(b, b + 1))]
        if missing:
            chosen = self._allowed is not None or bool(self._blocked)
            raise explain_missing(view, graph.model, _joined(missing), chosen=chosen)
        for block in scarce:
            holders[block] = [graph.slots[s.peer] for s in last_resort if s.span and block in s.span]
        edges = {b for b in scarce if b - 1 not in scarce} | {b + 1 for b in scarce if b + 1 not in scarce}
        return holders, frozenset(edges)

    def _query(
        self,
        graph: ServerGraph,
        view: SwarmView,
        span: Span,
        holders: Sequence[Sequence[int]],
        borders: frozenset[int],
        tokens: int,
        after: PeerId | None,
        before: PeerId | None,
    ) -> Query:
        costs, random = self.costs, self._rng.random
        every = costs.transfer(graph.model) + costs.hop_seconds
        entry = []
        for vertex in graph.vertices:
            seconds = every + TIE * random()
            if vertex is not None:
                seconds += vertex.info.queue_seconds
                if tokens > vertex.info.cache_tokens_free:
                    seconds += costs.room(vertex.info, tokens)
            entry.append(seconds)
        published = _published(view, after)
        arrive = [0.0] * len(graph.vertices)
        for slot in holders[span.start]:
            peer = graph.info(slot).peer
            arrive[slot] = costs.one_way(after, peer, published.get(peer))
        leave = {}
        for slot in holders[span.end - 1]:
            vertex = graph.vertices[slot]
            assert vertex is not None
            known = vertex.published.get(before) if before else None
            leave[slot] = costs.one_way(vertex.info.peer, before, known)
        return Query(span=span, holders=holders, borders=borders, entry=entry, arrive=arrive, leave=leave)


def _published(view: SwarmView, peer: PeerId | None) -> dict[PeerId, float]:
    server = view.servers.get(peer) if peer is not None else None
    return published_rtts(server) if server is not None else {}


def _chain(graph: ServerGraph, path: Path, end: int) -> Chain:
    stages: list[Stage] = []
    rest: Path | None = path
    while rest is not None:
        slot, start, rest = rest
        stages.append(Stage(graph.info(slot), Span(start, end)))
        end = start
    return Chain(tuple(reversed(stages)))


def _hops(path: Path | None) -> int:
    hops = 0
    while path is not None:
        hops, path = hops + 1, path[2]
    return hops


def _fewest_hops(graph: ServerGraph, query: Query) -> int:
    hops, position = 0, query.span.start
    while position < query.span.end:
        limit = min((b for b in query.borders if b > position), default=query.span.end)
        ends = [span.end for slot in query.holders[position] if (span := graph.info(slot).span)]
        hops, position = hops + 1, min(max(ends), limit)
    return hops


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring spans, in order, made one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].end == span.start:
            joined[-1] = Span(joined[-1].start, span.end)
        else:
            joined.append(span)
    return joined
