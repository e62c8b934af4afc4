"""Names for the beginnings of sequences, by which servers find again what they have computed of them.

A client names each whole page of its tokens by a hash of the page and of the name before, so that a name
stands for all that comes before as well. The first is chained to what else decides what servers keep.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from swarmcore.errors import InvalidStepError

NAMED_TOKENS = 64
"""Tokens that a name stands for, besides all that come before."""

NAME_BYTES = 16

MAX_SESSION_NAMES = 4096
"""Names in one message, over all sequences of a session."""


_PAGE = struct.Struct(f"<{NAMED_TOKENS}q")


def prefix_root(*parts: str) -> bytes:
    """What the first name is chained to: model, adapter, codec and whatever else must be the same."""
    hashed = blake2b(digest_size=NAME_BYTES)
    for part in parts:
        encoded = part.encode()
        hashed.update(len(encoded).to_bytes(8, "little") + encoded)
    return hashed.digest()


def prefix_names(tokens: Sequence[int], root: bytes) -> bytes:
    """The names of all whole pages of ``tokens``, one after the other, `NAME_BYTES` each."""
    names = [root]
    for end in range(NAMED_TOKENS, len(tokens) + 1, NAMED_TOKENS):
        page = _PAGE.pack(*tokens[end - NAMED_TOKENS : end])
        names.append(blake2b(page, key=names[-1], digest_size=NAME_BYTES).digest())
    return b"".join(names[1:])


def check_names(names: Sequence[bytes], sequences: int) -> None:
    """Raise `InvalidStepError` unless these are names for each of so many sequences, or for none."""
    if not names:
        return
    if len(names) != sequences or any(len(each) % NAME_BYTES for each in names):
        raise InvalidStepError(
            f"the pages of {len(names)} sequences are named, each in {NAME_BYTES} bytes; expected those of "
            f"{sequences}"
        )
    if sum(map(len, names)) > MAX_SESSION_NAMES * NAME_BYTES:
        raise InvalidStepError(f"more than {MAX_SESSION_NAMES} pages are named in one message")
