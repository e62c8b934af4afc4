"""Plans the sessions of a swarm: routing on the present view, with what is known of servers' health."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

import attrs

from swarmcore.client.adapters import AdapterWeights
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
from swarmcore.routing.base import Router
from swarmcore.routing.chain import Chain
from swarmcore.routing.health import PeerHealth
from swarmcore.types import ModelInfo, PeerId, Span


def random_session_id() -> str:
    """128 random bits in hex, which nobody can guess."""
    return secrets.token_hex(16)


@attrs.frozen
class Comparison:
    """A session's chain, and the one it would take if it opened now."""

    current: float
    """Expected seconds of a token over the chain that it has."""
    better: float
    """The same over the best one."""
    chain: Chain
    """The best one."""
    replay: float
    """Expected seconds to fill the caches of its new servers."""


class SessionPlanner:
    """Chooses the servers of one model's sessions, and learns how they did."""

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
        """``session_id`` makes up ids of sessions, 32 hex digits that nobody can guess; the sessions are
        computed with ``adapter`` besides the frozen weights; ``on_use`` is called whenever one of them has
        got something done.
        """
        self.session_id = session_id
        self.adapter = adapter
        self._on_use = on_use
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
        """A chain for ``span``, as `Router.plan` gives it on what is known now."""
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

    def alone(self, peer: PeerId, span: Span) -> bool:
        """Whether nobody but ``peer`` has the blocks ``span``."""
        try:
            self.plan(span, blocked=frozenset([peer]))
        except SwarmError:
            return True
        return False

    def compare(self, chain: Chain, *, tokens: int = 0) -> Comparison | None:
        """A live session's chain beside the best there is for it; None when the router weighs no chains."""
        router, view = self._router, self._registry.view()
        current = router.cost(view, self._model, chain)
        if current is None:
            return None
        best = self.plan(self._model.span, tokens=tokens)
        better = router.cost(view, self._model, best)
        assert better is not None, "it has weighed the other one"
        new = Chain(tuple(stage for stage in best.stages if stage not in chain.stages))
        replay = router.prefill_seconds(view, self._model, new, tokens)
        return Comparison(current.seconds, better.seconds, best, replay)

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
        """A server has done a step of a session."""
        self._health.succeeded(peer)
        self._on_use()
