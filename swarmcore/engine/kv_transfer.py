"""Attention caches on their way: to another server in chunks, and into a session through its queue, from
another server or another sequence."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

import attrs

from swarmcore.engine.prefix_cache import PrefixScope, SequencePrefix
from swarmcore.engine.session import EngineSession, KVImport, QueueItem
from swarmcore.engine.session_manager import SessionManager
from swarmcore.engine.session_prefixes import SessionPrefixes
from swarmcore.errors import InputError, SessionLostError, SwarmError
from swarmcore.executor.base import BlockExecutor, Segment, executor_error
from swarmcore.tasks import loop_time
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

SHARE_TIMEOUT = 1.0
"""Seconds that a new session waits for room for what it begins with; it can do without."""


@attrs.frozen
class KVChunk:
    """Positions ``start`` to ``start + count`` of one sequence's attention cache."""

    sequence: int
    """Its number in the session."""
    start: int
    count: int
    tensors: tuple[Tensor, ...]
    """In the executor's own layout, exact."""


class KVTransfer:
    """Moves caches out of and into the executor, never while a batch works on them."""

    def __init__(
        self,
        executor: BlockExecutor,
        sessions: SessionManager,
        prefixes: SessionPrefixes,
        changed: Callable[[], None],
        answered: Callable[[QueueItem, asyncio.Future[None]], None],
    ) -> None:
        """``changed`` is called after each change of the sessions that does not come from a caller,
        ``answered`` when an item of a session's queue is answered or cancelled."""
        self._executor = executor
        self._sessions = sessions
        self._prefixes = prefixes
        self._changed = changed
        self._answered = answered
        self._imports: set[asyncio.Task[None]] = set()
        self.chunks = 0
        """Chunks of cache that went out or came in so far."""

    async def export(self, session: EngineSession, max_bytes: int) -> AsyncGenerator[KVChunk, None]:
        """As `Engine.export_cache`."""
        at_once = max_bytes // self._executor.cache_bytes_per_token
        if at_once < 1:
            raise InputError(
                f"a token of attention cache takes {self._executor.cache_bytes_per_token} bytes; no chunk of "
                f"{max_bytes} bytes can hold it"
            )
        self._sessions.pause(session)
        try:
            for index, sequence in enumerate(session.sequences):
                for start in range(0, session.lengths[index], at_once):
                    count = min(at_once, session.lengths[index] - start)
                    tensors = await self._executor.export_cache(sequence, start, count)
                    if session.closed:
                        raise SessionLostError(f"session {session.name[:8]} ended while it was exported")
                    self.chunks += 1
                    yield KVChunk(index, start, count, tensors)
        finally:
            self._sessions.resume(session, loop_time())
            self._advance()

    def submit(
        self,
        session: EngineSession,
        segment: Segment,
        timeout: float,
        tensors: Sequence[Tensor] = (),
        *,
        source: SequencePrefix | None = None,
    ) -> asyncio.Future[None]:
        """Have ``tensors``, or what ``source`` begins with, put into a session, in its turn."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        now = loop_time()
        item = KVImport(
            session=session,
            segments=(segment,),
            timeout=timeout,
            deadline=now + timeout,
            tensors=tensors,
            source=source,
            answer=answer,
            begin=self._begin,
        )
        answer.add_done_callback(partial(self._answered, item))
        self._sessions.submit(item, now)
        return answer

    async def begin_with(self, session: EngineSession, scope: PrefixScope, names: Sequence[bytes]) -> None:
        """Let the sequences of a new session begin with what is here of the pages that have these names.

        Where that fails they begin with nothing. Raise `SessionLostError` when the session has ended.
        """
        answers = [
            self.submit(session, segment, SHARE_TIMEOUT, source=source)
            for segment, source in self._prefixes.begin(session, scope, names)
        ]
        for result in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(result, BaseException):
                log.info("session %s begins without a prefix: %s", session.name[:8], result)
        if session.closed:
            raise SessionLostError(f"session {session.name[:8]} ended while it was opened")

    def _begin(self, item: KVImport) -> None:
        """The item has its room: have the executor take it in."""
        if item.source is not None:
            item.deadline = (
                math.inf
            )  # it may have to wait for a batch, which computing anew would have to, too
        task = asyncio.create_task(self._take_in(item), name="cache import")
        self._imports.add(task)
        task.add_done_callback(self._imports.discard)

    async def finish(self, timeout: float) -> None:
        """Wait until the executor has done what was begun."""
        if self._imports:
            await asyncio.wait(self._imports, timeout=timeout)

    async def _take_in(self, item: KVImport) -> None:
        [segment] = item.segments
        error: SwarmError | None = None
        try:
            if item.source is None:
                await self._executor.import_cache(
                    segment.sequence,
                    item.session.span,
                    segment.start,
                    segment.count,
                    item.tensors,
                    item.session.adapter,
                )
            else:
                await self._prefixes.share(item, item.source)
        except SwarmError as exc:
            error = exc
        except Exception as exc:
            log.exception("the executor failed to take in %d tokens of attention cache", segment.count)
            error = executor_error(exc)
        self.chunks += 1
        self._sessions.finish_import(item, error, loop_time())
        self._advance()

    def _advance(self) -> None:
        self._sessions.poll(loop_time())
        self._changed()
