"""Plans the sessions of a swarm: routing on the present view, with what is known of servers' health."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

from swarmcore.errors import CacheFullError, InputError, SwarmError, TooManyCallsError
from swarmcore.registry.base import Registry
from swarmcore.routing.chain import Chain, Router
from swarmcore.routing.health import PeerHealth
from swarmcore.types import ModelInfo, PeerId, Span


def random_session_id() -> str:
    """128 random bits in hex, which nobody can guess."""
    return secrets.token_hex(16)


class SwarmPlanner:
    """Plans the sessions of one model; see `swarmcore.client.opening.Planner`."""

    def __init__(
        self,
        registry: Registry,
        router: Router,
        health: PeerHealth,
        model: ModelInfo,
        *,
        session_id: Callable[[], str] = random_session_id,
    ) -> None:
        self.session_id = session_id
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
        return self._router.plan(
            self._registry.view(),
            self._model,
            span,
            tokens=tokens,
            blocked=blocked,
            banned=self._health.banned(asyncio.get_running_loop().time()),
            after=after,
            before=before,
        )

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """Avoid the server for a while, unless all it lacks is room or it was asked for the impossible."""
        if isinstance(error, CacheFullError | TooManyCallsError | InputError):
            return
        self._health.failed(peer, asyncio.get_running_loop().time(), error.message)
        self._registry.suspect(peer)

    def worked(self, peer: PeerId) -> None:
        self._health.succeeded(peer)
