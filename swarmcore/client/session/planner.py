"""Plans the sessions of a swarm: routing on the present view, with what is known of servers' health."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.session.opening import Comparison
from swarmcore.errors import (
    CacheFullError,
    ConnectionLostError,
    DeadlineExceededError,
    InputError,
    MissingBlocksError,
    PeerUnreachableError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.registry.base import Registry
from swarmcore.routing.chain import Chain, Router
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.types import ModelInfo, PeerId, Span


def random_session_id() -> str:
    """128 random bits in hex, which nobody can guess."""
    return secrets.token_hex(16)


class SessionPlanner:
    """Plans the sessions of one model; see `swarmcore.client.session.opening.Planner`."""

    def __init__(
        self,
        registry: Registry,
        router: Router,
        health: PeerHealth,
        model: ModelInfo,
        *,
        session_id: Callable[[], str] = random_session_id,
        adapter: AdapterWeights | None = None,
        on_use: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_use`` is called whenever a session of the model has got something done."""
        self.session_id = session_id
        self._on_use = on_use
        self.adapter = adapter
        self._registry = registry
        self._router = router
        self._health = health
        self._model = model

    def plan(
        self,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        view = self._registry.view()
        adapter = self.adapter.name.name if self.adapter is not None else ""
        if adapter:
            blocked = {*blocked, *(server.peer for server in view if adapter not in server.adapters)}
        try:
            return self._router.plan(
                view,
                self._model,
                span,
                tokens=tokens,
                blocked=blocked,
                banned=self._health.banned(asyncio.get_running_loop().time()),
                after=after,
                before=before,
            )
        except MissingBlocksError as exc:
            if not adapter:
                raise
            raise MissingBlocksError(
                f"only servers with the adapter {adapter!r} are used (serve --adapter {adapter}=FOLDER): "
                f"{exc.message}",
                **exc.details,
            ) from None

    def compare(self, chain: Chain, *, tokens: int = 0) -> Comparison | None:
        router, view = self._router, self._registry.view()
        if not isinstance(router, LeastLatency):
            return None
        best = self.plan(Span(0, self._model.blocks), tokens=tokens)
        new = Chain(tuple(stage for stage in best.stages if stage not in chain.stages))
        return Comparison(
            current=router.cost(view, self._model, chain).seconds,
            better=router.cost(view, self._model, best).seconds,
            chain=best,
            replay=router.prefill_seconds(view, self._model, new, tokens),
        )

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """Avoid the server for a while, unless all it lacks is room or it was asked for the impossible.

        When it may be dead, let the registry find out.
        """
        if isinstance(error, CacheFullError | TooManyCallsError | InputError):
            return
        self._health.failed(peer, asyncio.get_running_loop().time(), error.message)
        if isinstance(error, ConnectionLostError | PeerUnreachableError | DeadlineExceededError):
            self._registry.suspect(peer)

    def worked(self, peer: PeerId) -> None:
        self._health.succeeded(peer)
        self._on_use()
