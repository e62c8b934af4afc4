"""The inference protocol on a server: opens sessions for clients, lets earlier stages push into them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from functools import partial

from swarmcore.engine.engine import Engine
from swarmcore.engine.prefix_cache import PrefixScope
from swarmcore.errors import InvalidStepError, ServerDrainingError, SessionLostError
from swarmcore.registry.base import Registry
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore, ask_for_weights
from swarmcore.server.downstream import StageDialer
from swarmcore.server.session import ServerSession
from swarmcore.server.span_service import SpanService
from swarmcore.server.upstream import check_upstream
from swarmcore.tasks import Deadline, deadline_after
from swarmcore.types import ModelInfo, PeerId, Span, short
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.limits import MAX_STEPS_IN_FLIGHT
from swarmcore.wire.messages import AskSession, JoinSession, OpenSession, SessionOpened, SessionState
from swarmcore.wire.method import Caller
from swarmcore.wire.prefix_names import check_names

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = 10.0
"""Seconds an earlier stage may be ahead of the client that opens the session here."""

_SESSION_ID = re.compile(r"[0-9a-f]{32}")


class InferenceService(SpanService):
    """Serves `INFERENCE_PROTOCOL` with one engine. ``admission_timeout`` is in seconds."""

    new_work = "sessions"

    def __init__(
        self,
        engine: Engine,
        model: ModelInfo,
        span: Span,
        node: Node,
        registry: Registry,
        *,
        admission_timeout: float,
        adapters: AdapterStore | None = None,
        share_prefixes: bool = False,
    ) -> None:
        """Without ``adapters`` no session has one. With ``share_prefixes`` sessions begin with what was
        computed for other clients, too."""
        super().__init__(engine, model, span, adapters or AdapterStore(engine.executor, 0, node.resources))
        self._node = node
        self._dialer = StageDialer(node, registry, self.counters)
        self._admission_timeout = admission_timeout
        self._share_prefixes = share_prefixes
        self._sessions: dict[str, ServerSession] = {}
        self._awaited: dict[str, set[asyncio.Future[ServerSession]]] = {}
        self._session_ended = asyncio.Event()

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    @property
    def drafts(self) -> str:
        """What clients have had verified, in words; nothing where none did."""
        counted = self.counters
        if not (rows := counted["rows_verified"]):
            return ""
        return (
            f"{rows} rows in {counted['steps_verified']} steps of several; {counted['rows_taken_back']} were "
            f"taken back, {counted['rows_recalled']} called back before they were computed"
        )

    async def state(self, request: AskSession, caller: Caller) -> SessionState:
        """Serve `SESSION_STATE_METHOD`: tell a client of its session, and of nobody else's."""
        session = self._sessions.get(request.session)
        if session is None or session.client != caller.peer:
            return SessionState(known=False)
        try:
            return session.state
        except SessionLostError:
            return SessionState(known=False)

    async def drain(self, seconds: float, *, keep: Span | None = None) -> int:
        """Ask clients to move their sessions elsewhere, and wait for up to ``seconds`` until they have.

        With ``keep``, only sessions that need blocks outside of it have to go, and new ones within it are
        still welcome; without, none are. Return how many of those that had to go are still here.
        """
        self.keep_only(keep)
        leaving = self._outside(keep)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(session.announce_drain(seconds) for session in leaving.values()))
                await self._until_ended(leaving)
        return len(leaving.keys() & self._sessions.keys())

    async def end(self, *, keep: Span | None = None) -> None:
        """End the sessions that need blocks outside of ``keep``, after `drain` gave them time to leave."""
        leaving = self._outside(keep)
        for session in leaving.values():
            session.end()
        await self._until_ended(leaving)

    async def _until_ended(self, leaving: dict[str, ServerSession]) -> None:
        while leaving.keys() & self._sessions.keys():
            self._session_ended.clear()
            await self._session_ended.wait()

    def _outside(self, keep: Span | None) -> dict[str, ServerSession]:
        return {
            session.id: session
            for session in self._sessions.values()
            if keep is None or not keep.covers(session.span)
        }

    async def serve(self, channel: Channel) -> None:
        """Handle one channel until it ends."""
        opening = channel.opening.record
        if isinstance(opening, OpenSession):
            await self._open(channel, opening)
        else:
            await self._join(channel, opening)

    async def _open(self, channel: Channel, opening: OpenSession) -> None:
        span = self._check(opening)
        ask = partial(ask_for_weights, channel)
        async with self._adapters.obtain(channel.remote, opening.adapter, span, ask) as adapter:
            cached = await self._engine.open(
                opening.session,
                opening.sequences,
                opening.tokens,
                timeout=self._admission_timeout,
                span=span,
                adapter=adapter,
                caller=channel.remote,
                names=opening.names,
                scope=self._prefix_scope(channel.remote, opening.adapter, span),
            )
            await self._run(channel, opening, cached)

    def _prefix_scope(self, client: PeerId, adapter: AdapterName | None, span: Span) -> PrefixScope:
        """Whose prefixes are a client's, too. Nobody else knows what its own adapters are."""
        own = adapter is not None and adapter.version != ""
        name = "" if adapter is None else adapter.version or adapter.name
        return PrefixScope("" if self._share_prefixes and not own else client, span, name)

    async def _run(self, channel: Channel, opening: OpenSession, cached: tuple[int, ...]) -> None:
        """Serve a session for which there is room, to its end."""
        session = ServerSession(
            opening,
            engine=self._engine,
            node=self._node,
            dialer=self._dialer,
            client=channel,
            counters=self.counters,
        )
        try:
            self._check(opening)  # again: it may have waited for room while the server began to leave
            async with Deadline(session.lifetime, _blocks_gone):
                self._sessions[session.id] = session
                self.counters["sessions_opened"] += 1
                logger.info(
                    "session %s of %s opened on blocks %s",
                    session.id[:8],
                    short(channel.remote),
                    session.span,
                )
                for waiting in self._awaited.get(session.id, ()):
                    if not waiting.done():
                        waiting.set_result(session)
                reachable = opening.next_hop is None or await session.dial(opening.next_hop)
                free, in_flight = self._engine.cache_tokens_free, MAX_STEPS_IN_FLIGHT
                await channel.send(SessionOpened(free, reachable, cached, in_flight))
                session.start()
                await session.receive_from(channel, is_client=True)
        finally:
            if self._sessions.pop(session.id, None) is not None:
                logger.info("session %s of %s ended", session.id[:8], short(channel.remote))
            await session.close()
            self._session_ended.set()

    async def _join(self, channel: Channel, opening: JoinSession) -> None:
        _check_id(opening.session)
        session = self._sessions.get(opening.session) or await self._wait_for(opening.session)
        async with session.upstream.connected(channel.remote):
            await session.receive_from(channel, is_client=False)

    async def _wait_for(self, session: str) -> ServerSession:
        """Wait for the client to open ``session``: a stage may dial its successor before the client does."""
        future: asyncio.Future[ServerSession] = asyncio.get_running_loop().create_future()
        waiting = self._awaited.setdefault(session, set())
        waiting.add(future)
        try:
            async with deadline_after(
                JOIN_TIMEOUT,
                lambda: SessionLostError(f"no session {session[:8]}… here: it was closed, or never opened"),
            ):
                return await future
        finally:
            waiting.discard(future)
            if not waiting:
                self._awaited.pop(session, None)

    def _check(self, opening: OpenSession) -> Span:
        span = self.check_opening(opening)
        _check_id(opening.session)
        if opening.session in self._sessions:
            raise InvalidStepError("a session id is 32 hex digits, random, and used once")
        check_upstream(opening.pushers or ())
        check_names(opening.names, opening.sequences)
        return span


def _blocks_gone() -> ServerDrainingError:
    return ServerDrainingError("the session was ended: this server had to let go of its blocks")


def _check_id(session: str) -> None:
    if not _SESSION_ID.fullmatch(session):
        raise InvalidStepError("a session id is 32 hex digits, random, and used once")
