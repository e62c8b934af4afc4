"""Attention caches on their way from one server to another: out in chunks, in through the session's queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

import attrs

from swarmcore.engine.session import EngineSession, KVImport
from swarmcore.engine.session_manager import SessionManager
from swarmcore.errors import InputError, SessionLostError, SwarmError
from swarmcore.executor.base import BlockExecutor, executor_error
from swarmcore.tasks import loop_time
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)


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
        self, executor: BlockExecutor, sessions: SessionManager, changed: Callable[[], None]
    ) -> None:
        """``changed`` is called after each change of the sessions that does not come from a caller."""
        self._executor = executor
        self._sessions = sessions
        self._changed = changed
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

    def begin(self, item: KVImport) -> None:
        """The item has its room: have the executor take it in."""
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
            await self._executor.import_cache(
                segment.sequence,
                item.session.span,
                segment.start,
                segment.count,
                item.tensors,
                item.session.adapter,
            )
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
