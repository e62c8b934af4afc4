"""Which chain has computed which pages, as one client remembers it."""

from __future__ import annotations

import pytest

from swarmcore.routing import prefix_memory
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.prefix_memory import PrefixMemory
from swarmcore.types import PeerId, ServerInfo, Span


def chain(peer: str) -> Chain:
    return Chain((Stage(ServerInfo(PeerId(peer), ()), Span(0, 3)),))


def names(text: str) -> bytes:
    return b"".join(text[:end].encode().ljust(16) for end in range(1, len(text) + 1))


def test_the_chain_that_has_most_of_it() -> None:
    memory = PrefixMemory()
    memory.remember([names("ab"), names("xyz")], chain("one"))
    memory.remember([names("abc")], chain("two"))
    assert memory.recall([names("abcd")]) == (chain("two"), 192)
    assert memory.recall([names("abx")]) == (chain("two"), 128), "it has computed that last"
    assert memory.recall([names("abx"), names("xyz")]) == (chain("one"), 192)
    assert memory.recall([names("q"), b""]) is None


def test_what_is_gone_is_forgotten() -> None:
    memory = PrefixMemory()
    memory.remember([names("abc")], chain("one"))
    memory.forget([names("ab"), names("q")])
    assert memory.recall([names("ab")]) is None
    assert memory.recall([names("abc")]) == (chain("one"), 192)


def test_what_was_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_memory, "MAX_NAMES", 3)
    memory = PrefixMemory()
    for text in ("a", "b", "c", "a", "d"):
        memory.remember([names(text)], chain(text))
    assert [memory.recall([names(text)]) is not None for text in "abcd"] == [True, False, True, True]
    assert len(memory) == 3
