"""Plans the sessions of a swarm: routing on the present view, with what is known of servers' health."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

import attrs

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.session.prefix import SessionPrefix
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
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.coverage import left_out
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.numerics import plan_alike
from swarmcore.routing.prefix_memory import PrefixMemory
from swarmcore.routing.step_codec import StepCodecs
from swarmcore.types import ADAPTERS, ModelInfo, Numerics, PeerId, ServerInfo, Span


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
        prefixes: PrefixMemory | None = None,
        codecs: StepCodecs | None = None,
        on_use: Callable[[], None] = lambda: None,
    ) -> None:
        """``session_id`` makes up ids of sessions, 32 hex digits that nobody can guess; the sessions are
        computed with ``adapter`` besides the frozen weights; ``prefixes`` knows who has computed what before,
        ``codecs`` how fast links are; ``on_use`` is called whenever one of them has got something done.
        """
        self.session_id = session_id
        self.adapter = adapter
        self.prefixes = prefixes if prefixes is not None else PrefixMemory()
        self.codecs = codecs if codecs is not None else StepCodecs()
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
        like: Numerics | None = None,
    ) -> Chain:
        """A chain for ``span``, as `plan_alike` gives it on what is known now.

        Sessions with an adapter go through servers that have it, or take it. When too few do, the
        `MissingBlocksError` says which were left out for that.
        """
        view = self._registry.view()
        servers = view.serving(self._model.fingerprint) if self.adapter is not None else []
        unable = [server.peer for server in servers if not self._has_adapter(server)]
        try:
            return plan_alike(
                self._router,
                view,
                self._model,
                span,
                like=like,
                tokens=tokens,
                blocked={*blocked, *unable},
                banned=self._health.banned(asyncio.get_running_loop().time()),
                after=after,
                before=before,
            )
        except MissingBlocksError as exc:
            if self.adapter is None:
                raise
            name = self.adapter.name.name
            used = f"with the adapter {name!r} are used (serve --adapter {name}=FOLDER)"
            used = used if name else "that take adapters are used"
            raise MissingBlocksError(
                f"only servers {used}: {exc.message}{left_out(servers, [ADAPTERS])}", **exc.details
            ) from None

    def _has_adapter(self, server: ServerInfo) -> bool:
        """Whether it serves the sessions' adapter, or takes the client's own."""
        name = self.adapter.name.name if self.adapter is not None else ""
        return ADAPTERS in server.capabilities and (not name or name in server.adapters)

    def begun(self, best: Chain, prefix: SessionPrefix, *, tokens: int, blocked: Collection[PeerId]) -> Chain:
        """The chain that has computed what a session begins with, or ``best`` where that takes less time.

        In all, for the prompt and for the tokens that follow it, of ``tokens``.
        """
        if (found := self.prefixes.recall(prefix.names_on(""))) is None:
            return best
        view, (known, begun) = self._registry.view(), found
        banned = self._health.banned(asyncio.get_running_loop().time())
        stages = [
            Stage(server, stage.span)
            for stage in known.stages
            for server in view.serving(self._model.fingerprint)
            if server.peer == stage.server.peer
            and server.state == "online"
            and server.span is not None
            and server.span.covers(stage.span)
            and server.peer not in blocked
            and server.peer not in banned
            and self._router.admits(server.peer)
            and (self.adapter is None or self._has_adapter(server))
        ]
        chain, router = Chain(tuple(stages)), self._router
        if len(chain) < len(known) or chain.numerics != best.numerics:
            return best
        usual, again = router.cost(view, self._model, best), router.cost(view, self._model, chain)
        if usual is None or again is None:
            return chain
        follow = max(tokens - sum(map(len, prefix.tokens)), 0) // len(prefix.tokens)
        saved = router.prefill_seconds(view, self._model, best, begun)
        return chain if follow * (again.seconds - usual.seconds) <= saved else best

    def alone(self, peer: PeerId, span: Span) -> bool:
        """Whether nobody but ``peer`` has the blocks ``span``."""
        try:
            self.plan(span, blocked=frozenset([peer]))
        except SwarmError:
            return True
        return False

    def compare(self, chain: Chain, *, tokens: int = 0) -> Comparison | None:
        """A live session's chain beside the best there is for it; None when the router weighs no chains.

        Also None when that would compute in another way than all of the session's servers: no session changes
        that for speed.
        """
        router, view = self._router, self._registry.view()
        current = router.cost(view, self._model, chain)
        if current is None:
            return None
        (like,) = chain.numerics if len(chain.numerics) == 1 else (None,)
        best = self.plan(self._model.span, tokens=tokens, like=like)
        if like is not None and best.numerics != (like,):
            return None
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
