"""Names of pages: equal for equal beginnings and for nothing else, and bounded where they come in."""

from __future__ import annotations

import pytest

from swarmcore.errors import InvalidStepError
from swarmcore.wire.prefix_names import (
    MAX_SESSION_NAMES,
    NAME_BYTES,
    NAMED_TOKENS,
    check_names,
    prefix_names,
    prefix_root,
)

TOKENS = list(range(3 * NAMED_TOKENS + 5))
ROOT = prefix_root("model", "adapter")
EXPECTED = "71b3e803a2c319304e6b4c9d2eb1c46aba6605d544f774902598d713923b9d5627749ae2c4a7fc2e4cf84376a9630e33"


def pages(names: bytes) -> list[bytes]:
    return [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]


def test_whole_pages_have_names_that_stand_for_all_before() -> None:
    names = pages(prefix_names(TOKENS, ROOT))
    assert len(names) == len(set(names)) == 3
    assert pages(prefix_names(TOKENS[: 2 * NAMED_TOKENS], ROOT)) == names[:2]
    other = pages(prefix_names([7, *TOKENS[1:]], ROOT))
    assert not set(other) & set(names)
    other = pages(prefix_names([*TOKENS[: NAMED_TOKENS + 3], 7, *TOKENS[NAMED_TOKENS + 4 :]], ROOT))
    assert other[0] == names[0] and not set(other[1:]) & set(names)
    assert prefix_names(TOKENS[: NAMED_TOKENS - 1], ROOT) == b""


def test_names_stay_what_they_are() -> None:
    """Clients of different versions share prefixes where servers let them."""
    assert prefix_names(TOKENS, ROOT).hex() == EXPECTED


def test_roots_tell_their_parts_apart() -> None:
    roots = {prefix_root(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ())}
    assert len(roots) == 5


def test_what_comes_in_is_checked() -> None:
    name = b"x" * NAME_BYTES
    check_names((), 3)
    check_names((name, b"", 2 * name), 3)
    check_names((MAX_SESSION_NAMES * name,), 1)
    for wrong in ((name,), (name, name, name[:-1]), ((MAX_SESSION_NAMES - 1) * name, name, name)):
        with pytest.raises(InvalidStepError):
            check_names(wrong, 3)
