"""What the sequences of sessions begin with, and what the executor keeps of them when they have ended."""

from __future__ import annotations

from collections.abc import Sequence

from swarmcore.engine.prefix_cache import PrefixCache, PrefixScope, SequencePrefix
from swarmcore.engine.session import EngineSession, KVImport, QueueItem
from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.executor.base import BlockExecutor, Segment
from swarmcore.types import Span


class SessionPrefixes:
    """Tells a `PrefixCache` what becomes of sequences, and the executor what to share, keep and release."""

    def __init__(self, executor: BlockExecutor, cache: PrefixCache) -> None:
        self._executor = executor
        self._cache = cache

    def begin(
        self, session: EngineSession, scope: PrefixScope, names: Sequence[bytes]
    ) -> list[tuple[Segment, SequencePrefix]]:
        """Name the pages of a new session; return what is to be shared with its sequences, and of whom."""
        caller, prefix_tokens = session.allocation.caller, session.allocation.page.prefix_tokens
        session.prefixes = [
            self._cache.begin(sequence, scope, caller, each, prefix_tokens)
            for sequence, each in zip(session.sequences, names, strict=True)
        ]
        shared = []
        for prefix in session.prefixes:
            if (found := self._cache.find(scope, prefix.names)) is not None:
                source, pages = found
                shared.append((Segment(prefix.sequence, 0, pages * self._cache.named_tokens), source))
        return shared

    async def share(self, item: KVImport, source: SequencePrefix) -> None:
        """Let a sequence begin with pages of ``source``. Raise what `BlockExecutor.share_prefix` raises."""
        [segment] = item.segments
        pages = source.pages[: segment.count // self._cache.named_tokens]
        if len(pages) * self._cache.named_tokens < segment.count:
            raise SessionLostError("the prefix is no longer here")
        try:
            await self._executor.share_prefix(source.sequence, segment.sequence, segment.count)
        except (SessionLostError, InvalidStepError):
            if self._cache.lost(source):
                self._executor.release(source.sequence)
            raise
        if not item.session.closed:
            first = item.session.sequences[0]
            self._cache.shared(pages, item.session.prefixes[segment.sequence - first])

    def begins(self, item: QueueItem) -> None:
        """The item is about to write into its sequences, which are reordered."""
        if prefixes := item.session.prefixes:
            if item.sources:
                self._cache.reordered(prefixes, item.sources)
            first = item.session.sequences[0]
            for segment in item.segments:
                self._cache.rolled_back(prefixes[segment.sequence - first], segment.start)

    def finished(self, item: QueueItem) -> None:
        """The item is done."""
        session = item.session
        for prefix, length in zip(session.prefixes, session.lengths, strict=False):
            self._cache.computed(prefix, length, own=item.source is None)

    def rename(self, session: EngineSession, names: Sequence[bytes]) -> None:
        """The session's client names more of its pages."""
        for prefix, each, length in zip(session.prefixes, names, session.lengths, strict=False):
            self._cache.rename(prefix, each, length)

    def release(self, session: EngineSession) -> None:
        """The session is over: release its sequences, but for what is kept of them."""
        page = session.allocation.page
        kept = {prefix.sequence: self._cache.keep(prefix) for prefix in session.prefixes}
        for sequence in session.sequences:
            if tokens := kept.get(sequence):
                pages = -(-(tokens + page.prefix_tokens) // page.tokens)
                self._executor.reserve(sequence, pages * page.tokens)
            else:
                self._executor.release(sequence)

    def shrink(self, pages: int) -> None:
        """Take back what is kept until it is ``pages`` pages at most."""
        for sequence in self._cache.shrink(pages):
            self._executor.release(sequence)

    def forget_outside(self, keep: Span | None) -> None:
        """Let go of what is kept of blocks outside of ``keep``; without it, of all, for good."""
        for sequence in self._cache.leave(keep):
            self._executor.release(sequence)
