"""Beginnings of sequences, found again by the names of their pages, also when their session has ended.

A server sees hidden states and never tokens. So it is the client that names what its sequences begin with:
`swarmcore.wire.prefix_names` makes a name for each page, chained, so that equal names mean equal
beginnings. Who names wrongly gets wrong results, and nobody else does: names are looked up among those of
the same `PrefixScope` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import attrs

from swarmcore.executor.base import BlockExecutor, SequenceId
from swarmcore.types import Span
from swarmcore.wire.prefix_names import NAME_BYTES, NAMED_TOKENS

MAX_KEPT = 1024
"""Sequences of which the beginning is kept when their session has ended."""

MAX_NAMES = 65536
"""Names of all sequences together, of live sessions and kept; of one caller half as many."""


@attrs.frozen
class PrefixScope:
    """Sequences that may begin with each other's pages, computed by the same blocks with one adapter."""

    namespace: str
    """Whose names they are: a client's peer id, or empty where all trust each other."""
    span: Span
    adapter: str = ""


@attrs.define(eq=False)
class _Page:
    """A page's keys and values, which several sequences may have in common."""

    caller: str
    """In whose share it counts."""
    kept_by: int = 0
    """Sequences without a session that have it."""


@attrs.define(eq=False, kw_only=True)
class SequencePrefix:
    """What one sequence begins with, as far as its client has named it."""

    sequence: SequenceId
    scope: PrefixScope
    caller: str
    prefix_tokens: int = 0
    """Cached positions before its first token."""
    names: bytes = b""
    """`NAME_BYTES` for each page that is, or is yet to be, computed."""
    pages: list[_Page] = attrs.field(factory=list)
    """Those that are computed."""
    reached: int = 0
    """Up to where the session's own steps have come. A step that begins below it brings other tokens than
    those that were named; what was only shared with the sequence may be computed again."""

    def key(self, pages: int) -> tuple[PrefixScope, int, bytes]:
        """Under which its first ``pages`` pages are found."""
        return self.scope, pages, self.names[(pages - 1) * NAME_BYTES : pages * NAME_BYTES]


class PrefixCache:
    """Knows which sequences begin with which pages, and keeps some of these when their sessions have ended.

    A plain object. What it keeps takes room that nobody else has: the owner calls `shrink` before that is
    given away, and releases the sequences that it returns, of which the least recently used go first. One
    caller's take half of ``pages`` at most.
    """

    def __init__(
        self, executor: BlockExecutor, pages: int, *, blocks: int, named_tokens: int = NAMED_TOKENS
    ) -> None:
        """``pages`` is the whole cache, in pages of the executor through ``blocks`` blocks."""
        page = executor.page
        self.named_tokens = named_tokens
        """Tokens that a name stands for."""
        fits = named_tokens % page == 0 or page % named_tokens == 0
        self.enabled = executor.prefix_sharing != "none" and fits
        self.hits = 0
        """Sequences that began with pages of another one."""
        self.hit_tokens = 0
        self._step = max(1, page // named_tokens)
        self._shares_pages = executor.prefix_sharing == "pages"
        self._blocks = blocks if executor.caches_whole_span else 0
        self._max_kept = min(MAX_KEPT, (executor.max_sequences or 2 * MAX_KEPT) // 2)
        self._page, self._page_room = page, page * blocks
        self._max_of_caller = pages * self._page_room // 2
        self._kept: dict[SequencePrefix, None] = {}
        self._superseded: list[SequencePrefix] = []
        """Kept ones all of whose pages another one has, and more."""
        self._room: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._index: dict[tuple[PrefixScope, int, bytes], dict[SequencePrefix, None]] = {}
        """By how many pages the name stands for, too: nobody has to give each page a name of its own."""

    @property
    def pages(self) -> int:
        """Pages that are kept for sequences without a session, rounded up."""
        return -(-self._room.total() // self._page_room)

    def counters(self) -> dict[str, float]:
        """What has happened since the start, by name."""
        return {"prefix_hits": self.hits, "prefix_tokens": self.hit_tokens, "prefix_pages": self.pages}

    def __len__(self) -> int:
        return len(self._kept)

    # --- sequences of sessions ---------------------------------------------------------------------------

    def begin(
        self, sequence: SequenceId, scope: PrefixScope, caller: str, names: bytes, prefix_tokens: int = 0
    ) -> SequencePrefix:
        """A new sequence of ``caller``. Its names are dropped where too many are there already."""
        prefix = SequencePrefix(sequence=sequence, scope=scope, caller=caller, prefix_tokens=prefix_tokens)
        self.rename(prefix, names, 0)
        return prefix

    def rename(self, prefix: SequencePrefix, names: bytes, length: int) -> None:
        """Its client names more of a sequence of which ``length`` tokens are computed.

        The pages that have a name already are called by the same, or this is passed over.
        """
        own = len(prefix.pages) * NAME_BYTES
        if self.enabled and names[:own] == prefix.names[:own] and self._room_for(prefix, names):
            self._set_names(prefix, names)
            self.computed(prefix, length, own=False)

    def find(self, scope: PrefixScope, names: bytes) -> tuple[SequencePrefix, int] | None:
        """A sequence that has most of the pages so named, and how many of them."""
        for pages in range(len(names) // NAME_BYTES // self._step * self._step, 0, -self._step):
            name = names[(pages - 1) * NAME_BYTES : pages * NAME_BYTES]
            if found := self._index.get((scope, pages, name)):
                prefix = next(reversed(found))
                if prefix in self._kept:
                    self._kept[prefix] = self._kept.pop(prefix)
                return prefix, pages
        return None

    def shared(self, pages: Sequence[_Page], target: SequencePrefix) -> None:
        """The executor has let ``target`` begin with these pages of another sequence."""
        self.hits += 1
        self.hit_tokens += len(pages) * self.named_tokens
        self._add(target, self._copied(pages, target))

    def computed(self, prefix: SequencePrefix, length: int, *, own: bool = True) -> None:
        """The sequence has ``length`` tokens; they came by a step of its ``own``."""
        if own:
            prefix.reached = max(prefix.reached, length)
        pages = min(length // self.named_tokens, len(prefix.names) // NAME_BYTES) - len(prefix.pages)
        if pages > 0:
            self._add(prefix, [_Page(prefix.caller) for _ in range(pages)])

    def rolled_back(self, prefix: SequencePrefix, start: int) -> None:
        """A step begins to write at ``start``."""
        pages = start // self.named_tokens
        self._forget_pages(prefix, pages)
        if start < prefix.reached:
            self._set_names(prefix, prefix.names[: pages * NAME_BYTES])
            prefix.reached = start

    def reordered(self, prefixes: Sequence[SequencePrefix], sources: Sequence[int]) -> None:
        """Each sequence is a copy of one of them now."""
        before = [attrs.evolve(prefix, pages=list(prefix.pages)) for prefix in prefixes]
        for prefix, at, source in zip(prefixes, range(len(prefixes)), sources, strict=True):
            if at != source:
                self._forget_pages(prefix, 0)
                was = before[source]
                prefix.reached = was.reached
                if self._room_for(prefix, was.names):
                    self._set_names(prefix, was.names)
                    self._add(prefix, self._copied(was.pages, prefix))
                else:
                    self._set_names(prefix, b"")

    # --- sequences whose session has ended ---------------------------------------------------------------

    def keep(self, prefix: SequencePrefix) -> int:
        """Its session has ended: how many of its tokens are kept from now on; 0 releases its sequence.

        Others may have to go for that: call `shrink`.
        """
        self._forget_pages(prefix, len(prefix.pages) // self._step * self._step)
        self._set_names(prefix, prefix.names[: len(prefix.pages) * NAME_BYTES])
        count = len(prefix.pages)
        if not self.enabled or not count or len(self._index[prefix.key(count)]) > 1:
            self.forget(prefix)
            return 0
        for pages in range(1, count):
            found = self._index[prefix.key(pages)]
            self._superseded += [old for old in found if old in self._kept and len(old.pages) == pages]
        self._kept[prefix] = None
        for page in prefix.pages:
            page.kept_by += 1
            self._charge(page.caller, self._weight(prefix) * (page.kept_by == 1))
        self._charge(prefix.caller, self._before(prefix))
        return count * self.named_tokens

    def shrink(self, pages: int) -> Iterator[SequenceId]:
        """Forget kept sequences until they take ``pages`` pages at most, no caller more than its share."""
        while self._superseded:
            if (prefix := self._superseded.pop()) in self._kept:
                yield self.forget(prefix)
        for prefix in [kept for kept in self._kept if self._room[kept.caller] > self._max_of_caller]:
            if self._room[prefix.caller] > self._max_of_caller:
                yield self.forget(prefix)
        while self._kept and (self.pages > pages or len(self._kept) > self._max_kept):
            yield self.forget(next(iter(self._kept)))

    def leave(self, keep: Span | None) -> Iterator[SequenceId]:
        """Forget what is kept of blocks outside of ``keep``; without it, all, and keep nothing any more."""
        self.enabled = self.enabled and keep is not None
        for prefix in list(self._kept):
            if keep is None or not keep.covers(prefix.scope.span):
                yield self.forget(prefix)

    def lost(self, prefix: SequencePrefix) -> bool:
        """Its pages turn out not to be there. Whether its sequence, without a session, is to be released."""
        kept = prefix in self._kept
        self.forget(prefix)
        return kept

    def forget(self, prefix: SequencePrefix) -> SequenceId:
        """Its sequence is about to be released."""
        if prefix in self._kept:
            del self._kept[prefix]
            for page in prefix.pages:
                page.kept_by -= 1
                self._charge(page.caller, -self._weight(prefix) * (page.kept_by == 0))
            self._charge(prefix.caller, -self._before(prefix))
        self._forget_pages(prefix, 0)
        self._set_names(prefix, b"")
        return prefix.sequence

    def _charge(self, caller: str, room: int) -> None:
        self._room[caller] += room
        if not self._room[caller]:
            del self._room[caller]

    def _weight(self, prefix: SequencePrefix) -> int:
        return self.named_tokens * self._through(prefix)

    def _before(self, prefix: SequencePrefix) -> int:
        """What its positions before the first token take, in whole pages."""
        return -(-prefix.prefix_tokens // self._page) * self._page * self._through(prefix)

    def _through(self, prefix: SequencePrefix) -> int:
        """How many blocks' caches it takes."""
        return self._blocks or len(prefix.scope.span)

    def _copied(self, pages: Sequence[_Page], prefix: SequencePrefix) -> Sequence[_Page]:
        return pages if self._shares_pages else [_Page(prefix.caller) for _ in pages]

    # --- the index ---------------------------------------------------------------------------------------

    def _room_for(self, prefix: SequencePrefix, names: bytes) -> bool:
        more = (len(names) - len(prefix.names)) // NAME_BYTES
        return more <= min(MAX_NAMES - self._names.total(), MAX_NAMES // 2 - self._names[prefix.caller])

    def _set_names(self, prefix: SequencePrefix, names: bytes) -> None:
        self._names[prefix.caller] += (len(names) - len(prefix.names)) // NAME_BYTES
        if not self._names[prefix.caller]:
            del self._names[prefix.caller]
        prefix.names = names

    def _add(self, prefix: SequencePrefix, pages: Sequence[_Page]) -> None:
        for page in pages:
            prefix.pages.append(page)
            self._index.setdefault(prefix.key(len(prefix.pages)), {})[prefix] = None

    def _forget_pages(self, prefix: SequencePrefix, left: int) -> None:
        """All but its first ``left`` pages."""
        while len(prefix.pages) > left:
            key = prefix.key(len(prefix.pages))
            found = self._index[key]
            del found[prefix]
            if not found:
                del self._index[key]
            prefix.pages.pop()

    def __repr__(self) -> str:
        return f"<PrefixCache {self}>"

    def __str__(self) -> str:
        return (
            f"hits {self.hits}, tokens not computed again {self.hit_tokens}, sequences kept {len(self)}, "
            f"in pages {self.pages}"
        )
