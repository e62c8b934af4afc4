"""The inference protocol on a server: opens sessions for clients, lets earlier stages push into them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from functools import partial

from swarmcore.engine.engine import Engine
from swarmcore.errors import (
    InvalidStepError,
    ModelMismatchError,
    ServerDrainingError,
    SessionLostError,
    SpanError,
    StreamClosedError,
)
from swarmcore.registry.base import Registry
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore, ask_for_weights
from swarmcore.server.next_hops import StageDialer
from swarmcore.server.session import ServerSession
from swarmcore.server.upstream import AllowedUpstream, check_upstream
from swarmcore.types import ModelInfo, Span, short
from swarmcore.wire.messages import AskSession, JoinSession, OpenSession, SessionOpened, SessionState
from swarmcore.wire.method import Caller

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = 10.0
"""Seconds an earlier stage may be ahead of the client that opens the session here."""

_SESSION = re.compile(r"[0-9a-f]{32}")


class InferenceService:
    """Serves `INFERENCE_PROTOCOL` with one engine. ``admission_timeout`` is in seconds.

    ``span`` is what sessions may be opened on; a server that moves to other blocks changes it.
    """

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
    ) -> None:
        """Without ``adapters`` no session has one."""
        self.draining = False
        self.counters: Counter[str] = Counter()
        self._engine = engine
        self._model = model
        self.span = span
        self._node = node
        self._hops = StageDialer(node, registry, self.counters)
        self._admission_timeout = admission_timeout
        self._adapters = adapters or AdapterStore(engine.executor, 0, node.resources)
        self._sessions: dict[str, ServerSession] = {}
        self._stays: dict[str, asyncio.Timeout] = {}
        self._awaited: dict[str, set[asyncio.Future[ServerSession]]] = {}
        self._session_ended = asyncio.Event()

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

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
        if keep is None:
            self.draining = True
        else:
            self.span = keep
        leaving = self._outside(keep)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(session.announce_drain(seconds) for session in leaving.values()))
                while leaving.keys() & self._sessions.keys():
                    self._session_ended.clear()
                    await self._session_ended.wait()
        return len(leaving.keys() & self._sessions.keys())

    async def end(self, *, keep: Span | None = None) -> None:
        """End the sessions that need blocks outside of ``keep``, after `drain` gave them time to leave."""
        leaving = self._outside(keep)
        for session in leaving:
            if not self._stays[session].expired():
                self._stays[session].reschedule(asyncio.get_running_loop().time())
        while leaving.keys() & self._sessions.keys():
            self._session_ended.clear()
            await self._session_ended.wait()

    def _outside(self, keep: Span | None) -> dict[str, ServerSession]:
        return {
            session.session: session
            for session in self._sessions.values()
            if keep is None or not keep.start <= session.span.start < session.span.end <= keep.end
        }

    async def serve(self, channel: Channel) -> None:
        """Handle one channel until it ends."""
        opening = channel.opening.record
        if isinstance(opening, OpenSession):
            await self._host(channel, opening)
        else:
            await self._join(channel, opening)

    async def _host(self, channel: Channel, opening: OpenSession) -> None:
        span = self._check(opening)
        ask = partial(ask_for_weights, channel)
        async with self._adapters.obtain(channel.remote, opening.adapter, span, ask) as adapter:
            await self._engine.open(
                opening.session,
                opening.sequences,
                opening.tokens,
                timeout=self._admission_timeout,
                span=span,
                adapter=adapter,
                caller=channel.remote,
            )
            await self._run(channel, opening, span)

    async def _run(self, channel: Channel, opening: OpenSession, span: Span) -> None:
        """Serve a session for which there is room, to its end."""
        session = ServerSession(
            opening.session,
            span,
            opening.sequences,
            engine=self._engine,
            node=self._node,
            hops=self._hops,
            client=channel,
            pushers=AllowedUpstream(opening.pushers),
            counters=self.counters,
        )
        stay = asyncio.timeout(None)
        try:
            self._check(opening)  # again: it may have waited for room while the server began to leave
            async with stay:
                self._sessions[opening.session], self._stays[opening.session] = session, stay
                self.counters["sessions_opened"] += 1
                logger.info(
                    "session %s of %s opened on blocks %s", session.session[:8], short(channel.remote), span
                )
                for waiting in self._awaited.get(opening.session, ()):
                    if not waiting.done():
                        waiting.set_result(session)
                reachable = opening.next_hop is None or await session.dial(opening.next_hop)
                await channel.send(SessionOpened(self._engine.cache_tokens_free, reachable))
                session.start()
                await _take_messages(channel, session, from_client=True)
        except TimeoutError as exc:
            if not stay.expired():
                raise
            raise ServerDrainingError(
                "the session was ended: this server had to let go of its blocks"
            ) from exc
        finally:
            if self._sessions.pop(opening.session, None) is not None:
                logger.info("session %s of %s ended", session.session[:8], short(channel.remote))
            self._stays.pop(opening.session, None)
            await session.close()
            self._session_ended.set()

    async def _join(self, channel: Channel, opening: JoinSession) -> None:
        _check_id(opening.session)
        session = self._sessions.get(opening.session) or await self._arrival(opening.session)
        async with session.pushers.entered(channel.remote):
            await _take_messages(channel, session, from_client=False)

    async def _arrival(self, session: str) -> ServerSession:
        """Wait for the client to open ``session``: a stage may dial its successor before the client does."""
        future: asyncio.Future[ServerSession] = asyncio.get_running_loop().create_future()
        waiting = self._awaited.setdefault(session, set())
        waiting.add(future)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT):
                return await future
        except TimeoutError as exc:
            raise SessionLostError(f"no session {session[:8]}… here: it was closed, or never opened") from exc
        finally:
            waiting.discard(future)
            if not waiting:
                self._awaited.pop(session, None)

    def _check(self, opening: OpenSession) -> Span:
        if self.draining:
            raise ServerDrainingError("this server is shutting down and takes no new sessions")
        if opening.fingerprint != self._model.fingerprint:
            raise ModelMismatchError(
                f"this server holds other weights: it has {self._model.name} "
                f"({self._model.fingerprint[:12]}), the client asked for {opening.fingerprint[:12]}",
                fingerprint=self._model.fingerprint,
            )
        if not self.span.start <= opening.start < opening.end <= self.span.end:
            raise SpanError(
                f"blocks {opening.start}:{opening.end} are not all here: this server holds {self.span}"
            )
        _check_id(opening.session)
        if opening.session in self._sessions:
            raise InvalidStepError("a session id is 32 hex digits, random, and used once")
        check_upstream(opening.pushers or ())
        return Span(opening.start, opening.end)


def _check_id(session: str) -> None:
    if not _SESSION.fullmatch(session):
        raise InvalidStepError("a session id is 32 hex digits, random, and used once")


async def _take_messages(channel: Channel, session: ServerSession, *, from_client: bool) -> None:
    try:
        while True:
            await session.accept(await channel.receive(), from_client=from_client)
    except StreamClosedError:
        logger.debug("%r: %s has ended its stream", session, channel.remote)
