"""What a set of records holds, in short: so that two peers find where their sets differ, and only there.

Records fall into buckets by the hash of their owner. Two peers compare one hash per bucket (2 KB in all),
then list the entries of the buckets that differ (16 bytes a record), then send the records themselves. A
bucket's hash is taken over its sorted entries: a sum or XOR of entry hashes would be cheaper to keep, but
whoever is free to choose sequence numbers could steer it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b

from swarmcore.errors import ProtocolError
from swarmcore.types import PeerId

BUCKETS = 256
HASH_BYTES = 8
KEY_BYTES = 8

_ENTRY = struct.Struct("<8sQ")

Key = bytes
"""The first eight bytes of the hash of a peer id; the first of them is its bucket."""


@lru_cache(maxsize=16_384)
def key_of(peer: PeerId) -> Key:
    return blake2b(peer.encode(), digest_size=KEY_BYTES).digest()


class Digest:
    """The sequence number of each record in a set, hashed by bucket when asked for."""

    def __init__(self) -> None:
        self._buckets: list[dict[Key, int]] = [{} for _ in range(BUCKETS)]
        self._hashes = bytearray(_hash({}) * BUCKETS)
        self._stale: set[int] = set()

    def put(self, key: Key, sequence: int) -> None:
        self._buckets[key[0]][key] = sequence
        self._stale.add(key[0])

    def discard(self, key: Key) -> None:
        if self._buckets[key[0]].pop(key, None) is not None:
            self._stale.add(key[0])

    def hashes(self) -> bytes:
        """The hashes of all buckets, one after the other."""
        for bucket in self._stale:
            self._hashes[bucket * HASH_BYTES : (bucket + 1) * HASH_BYTES] = _hash(self._buckets[bucket])
        self._stale.clear()
        return bytes(self._hashes)

    def differing(self, theirs: bytes) -> list[int]:
        """Buckets in which a peer whose `hashes` are ``theirs`` holds something else.

        Raise `ProtocolError` when these are not the hashes of `BUCKETS` buckets.
        """
        if len(theirs) != BUCKETS * HASH_BYTES:
            raise ProtocolError(f"a digest has {BUCKETS * HASH_BYTES} bytes, not {len(theirs)}")
        ours = self.hashes()
        if ours == theirs:
            return []
        steps = range(0, len(ours), HASH_BYTES)
        return [
            at // HASH_BYTES for at in steps if ours[at : at + HASH_BYTES] != theirs[at : at + HASH_BYTES]
        ]


def pack_entries(entries: Iterable[tuple[Key, int]]) -> bytes:
    """Keys and sequence numbers, 16 bytes each."""
    return b"".join(_ENTRY.pack(key, sequence) for key, sequence in entries)


def unpack_entries(data: bytes) -> Iterator[tuple[Key, int]]:
    """The inverse of `pack_entries`. Raise `ProtocolError` when ``data`` is no whole number of entries."""
    if len(data) % _ENTRY.size:
        raise ProtocolError(f"a list of entries cannot have {len(data)} bytes")
    return iter(_ENTRY.iter_unpack(data))


def split_keys(data: bytes) -> list[Key]:
    """Keys that were put one after the other. Raise `ProtocolError` when there is no whole number of them."""
    if len(data) % KEY_BYTES:
        raise ProtocolError(f"a list of keys cannot have {len(data)} bytes")
    return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]


def _hash(bucket: dict[Key, int]) -> bytes:
    return blake2b(pack_entries(sorted(bucket.items())), digest_size=HASH_BYTES).digest()
