"""Which servers the batches of one model go to: shared out by speed, without those that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from swarmcore.client.planner import SwarmPlanner
from swarmcore.errors import MissingBlocksError, SwarmError
from swarmcore.registry.base import Registry
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.shares import ThroughputShares
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span, short

SMOOTHING = 0.2
"""Weight of a pass among those that went before, where a server's speed is measured."""


class PassPlanner:
    """Gives every micro-batch a chain, so that each server has work in proportion to its measured speed.

    Until a server has done a pass, its speed is what it announces.
    """

    def __init__(
        self,
        registry: Registry,
        health: PeerHealth,
        model: ModelInfo,
        sessions: SwarmPlanner,
        *,
        admits: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        """``sessions`` hears of failures, as it does of those of sessions."""
        self._registry, self._health, self._model = registry, health, model
        self._sessions, self._admits = sessions, admits
        self._shares = ThroughputShares(model)
        self._seconds: dict[PeerId, float] = {}
        """Of a token through a block, on average of late."""

    def __repr__(self) -> str:
        return f"<PassPlanner {self._model.name} · {len(self._seconds)} servers measured>"

    def chain(
        self, span: Span, *, tokens: int = 0, adapter: str = "", avoid: Collection[PeerId] = ()
    ) -> Chain:
        """A chain for the next micro-batch of ``tokens`` through ``span``; its servers are charged with it.

        Servers of ``avoid``, and those banned, are gone without unless nobody else has the blocks. Those that
        take no batch of that size, or do not serve the ``adapter`` of that name, are never asked. Raise
        `MissingBlocksError`.
        """
        able = [server for server in self._registry.view() if self._takes(server, tokens, adapter)]
        shunned = {*self._health.banned(asyncio.get_running_loop().time()), *avoid}
        if shunned:
            try:
                return self._plan([server for server in able if server.peer not in shunned], span)
            except MissingBlocksError:
                pass
        return self._plan(able, span)

    def worked(self, stage: Stage, tokens: int, seconds: float) -> None:
        """A server was at work on a pass of ``tokens`` tokens for so many seconds."""
        peer = stage.server.peer
        self._sessions.worked(peer)
        if seconds > 0 and tokens:
            now = seconds / (tokens * len(stage.span))
            before = self._seconds.get(peer, now)
            self._seconds[peer] = before + SMOOTHING * (now - before)

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """A server failed a pass."""
        self._sessions.failed(peer, error)

    def _takes(self, server: ServerInfo, tokens: int, adapter: str) -> bool:
        return (
            server.state == "online"
            and server.model is not None
            and server.model.fingerprint == self._model.fingerprint
            and server.pass_tokens >= max(tokens, 1)
            and (not adapter or adapter in server.adapters)
            and self._admits(server.peer)
        )

    def _plan(self, servers: list[ServerInfo], span: Span) -> Chain:
        self._shares.follow(servers)
        for server in servers:
            if server.peer in self._seconds and server.span:
                self._shares.add(server, 1 / (self._seconds[server.peer] * len(server.span)))
            elif server.forward_rps > 0:
                self._shares.add(server, server.forward_rps)
        try:
            return self._shares.next_chain(span)
        except MissingBlocksError as exc:
            raise MissingBlocksError(
                f"{exc.message}: {len(servers)} servers take batches"
                + (f" ({', '.join(short(server.peer) for server in servers[:4])})" if servers else ""),
                **exc.details,
            ) from None
