"""Which sequences begin with which pages, what is kept of them, and who goes first. No executor computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from swarmcore.engine import prefix_cache
from swarmcore.engine.prefix_cache import PrefixCache, PrefixScope, SequencePrefix
from swarmcore.executor.base import SequenceId
from swarmcore.testing.executor import CountingExecutor
from swarmcore.types import Span

SPAN = Span(0, 12)
SCOPE = PrefixScope("alice", SPAN)


def names(text: str) -> bytes:
    """A name for each letter; what comes before is part of it."""
    return b"".join(text[:end].encode().ljust(16) for end in range(1, len(text) + 1))


class Cache(PrefixCache):
    """Sequences of pages of 4 tokens, made by their names."""

    def __init__(self, pages: int = 100, *, sharing: Literal["none", "copies", "pages"] = "copies") -> None:
        executor = CountingExecutor(page=4)
        executor.prefix_sharing = sharing
        super().__init__(executor, pages, blocks=len(SPAN), named_tokens=4)
        self._ids: Iterator[int] = iter(range(1000))

    def new(self, text: str, *, scope: PrefixScope = SCOPE, computed: int | None = None) -> SequencePrefix:
        prefix = self.begin(SequenceId(next(self._ids)), scope, scope.namespace, names(text))
        self.computed(prefix, 4 * len(text) if computed is None else computed)
        return prefix

    def kept(self, text: str, *, scope: PrefixScope = SCOPE) -> SequencePrefix:
        prefix = self.new(text, scope=scope)
        self.keep(prefix)
        return prefix

    def pages_of(self, text: str, scope: PrefixScope = SCOPE) -> int:
        found = self.find(scope, names(text))
        return 0 if found is None else found[1]


def test_pages_are_found_by_name_once_they_are_computed() -> None:
    cache = Cache()
    prefix = cache.new("abc", computed=9)
    assert [cache.pages_of(text) for text in ("abc", "abx", "ax", "x", "")] == [2, 2, 1, 0, 0]
    cache.computed(prefix, 12)
    assert cache.pages_of("abcd") == 3
    assert cache.pages == 0, "what a live session has is counted as the session's"


def test_scopes_are_apart() -> None:
    cache = Cache()
    cache.kept("ab")
    for other in (
        PrefixScope("bob", SPAN),
        PrefixScope("alice", Span(0, 6)),
        PrefixScope("alice", SPAN, "adapter"),
    ):
        assert cache.pages_of("ab", other) == 0


def test_a_rollback_forgets_what_it_writes_over_and_what_that_was_called() -> None:
    cache = Cache()
    prefix = cache.new("abcd")
    cache.rolled_back(prefix, 9)
    assert cache.pages_of("abcd") == 2
    cache.computed(prefix, 16)
    assert cache.pages_of("abcd") == 2, "other tokens may have come"
    cache.rolled_back(prefix, 0)
    assert cache.pages_of("abcd") == 0


def test_what_was_shared_may_be_computed_again_under_its_name() -> None:
    cache = Cache()
    source, target = cache.kept("abc"), cache.begin(SequenceId(99), SCOPE, "alice", names("abcd"))
    cache.shared(source.pages[:3], target)
    # Another stage of the chain has one page only.
    cache.rolled_back(target, 4)
    cache.computed(target, 16)
    assert cache.pages_of("abcd") == 4
    assert cache.hits == 1 and cache.hit_tokens == 12


def test_names_follow_a_reordering() -> None:
    cache = Cache()
    prefixes = [cache.new("ab"), cache.new("cd"), cache.new("ef")]
    cache.reordered(prefixes, [1, 1, 2])
    assert [cache.pages_of(text) for text in ("ab", "cd", "ef")] == [0, 2, 2]
    cache.rolled_back(prefixes[1], 4)
    assert cache.pages_of("cd") == 2, "the other copy still has it"
    cache.rolled_back(prefixes[0], 0)
    assert cache.pages_of("cd") == 1


def test_a_client_names_more_when_more_is_computed() -> None:
    cache = Cache()
    prefix = cache.new("a")
    cache.rename(prefix, names("abc"), 9)
    assert cache.pages_of("abc") == 2
    cache.rename(prefix, names("xyz"), 12)
    assert cache.pages_of("xyz") == 0 and cache.pages_of("abc") == 2


@pytest.mark.parametrize(("sharing", "pages"), [("copies", 6), ("pages", 4)])
def test_pages_in_common_are_counted_once_where_the_executor_shares_them(
    sharing: Literal["copies", "pages"], pages: int
) -> None:
    cache = Cache(sharing=sharing)
    source = cache.kept("abc")
    branch = cache.begin(SequenceId(99), SCOPE, "alice", names("abx"))
    cache.shared(source.pages[:2], branch)
    cache.computed(branch, 12)
    cache.keep(branch)
    assert list(cache.shrink(100)) == []
    assert cache.pages == pages
    list(cache.leave(None))
    assert cache.pages == 0 and len(cache) == 0


def test_what_another_sequence_has_is_kept_once() -> None:
    cache = Cache()
    short = cache.kept("ab")
    long = cache.new("abc")
    assert cache.keep(cache.new("ab")) == 0
    assert cache.keep(long) == 12
    assert list(cache.shrink(100)) == [short.sequence]
    assert cache.pages == 3 and cache.pages_of("ab") == 2


def test_nothing_is_kept_of_a_sequence_without_a_whole_named_page() -> None:
    cache = Cache()
    assert cache.keep(cache.new("a", computed=3)) == 0
    assert cache.keep(cache.new("")) == 0
    assert cache.pages == 0


def test_the_least_recently_used_goes_first() -> None:
    cache = Cache()
    first, second, third = (cache.kept(text) for text in ("ab", "cd", "ef"))
    assert cache.pages_of("ab") == 2
    assert list(cache.shrink(5)) == [second.sequence]
    assert list(cache.shrink(2)) == [third.sequence]
    assert list(cache.shrink(1)) == [first.sequence]
    assert cache.pages == 0 and cache.pages_of("ab") == 0


def test_one_client_keeps_half_of_the_cache_at_most() -> None:
    cache = Cache(8)
    other = cache.kept("zy", scope=PrefixScope("bob", SPAN))
    kept = [cache.kept(text) for text in ("ab", "cd", "ef")]
    assert list(cache.shrink(8)) == [kept[0].sequence]
    assert cache.pages == 6
    assert list(cache.shrink(4)) == [other.sequence]


def test_nothing_is_remembered_of_clients_that_have_nothing_here() -> None:
    cache = Cache()
    for number in range(50):
        cache.kept("abc", scope=PrefixScope(f"client {number}", SPAN))
    assert len(list(cache.shrink(0))) == 50
    assert not cache._room and not cache._names and not cache._index


def test_sequences_of_a_part_of_the_blocks_take_that_part() -> None:
    cache = Cache()
    for letter in "abc":
        cache.kept(letter, scope=PrefixScope("alice", Span(0, 4)))
    assert cache.pages == 1
    assert len(list(cache.leave(Span(0, 6)))) == 0
    assert len(list(cache.leave(Span(2, 12)))) == 3


def test_names_and_kept_sequences_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_NAMES", 10)
    monkeypatch.setattr(prefix_cache, "MAX_KEPT", 3)
    cache = Cache()
    first = cache.new("abcd")
    assert cache.pages_of("xyz") == 0 and not cache.new("xyz").names
    others = [cache.kept(text, scope=PrefixScope("bob", SPAN)) for text in "stuv"]
    assert list(cache.shrink(100)) == [others[0].sequence]
    many = [first, *(cache.begin(SequenceId(100 + n), SCOPE, "alice", b"") for n in range(5))]
    cache.reordered(many, [0] * 6)
    assert [len(each.names) for each in many] == [64, 0, 0, 0, 0, 0]
    cache.forget(first)
    assert cache.new("xyz").names


def test_an_executor_that_shares_nothing_keeps_nothing() -> None:
    cache = Cache(sharing="none")
    prefix = cache.new("ab")
    assert not prefix.names and cache.keep(prefix) == 0
