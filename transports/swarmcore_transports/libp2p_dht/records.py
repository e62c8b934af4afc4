"""What the DHT carries: keys, and values that only their owners can have written."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Collection, Sequence

from swarmcore.errors import ProtocolError
from swarmcore.registry.gossip.records import (
    Announcement,
    RecordLimits,
    SignedRecord,
    decode_announcement,
    is_signed_by,
    may_announce,
)
from swarmcore.registry.gossip.store import Drop
from swarmcore.types import PeerId, ServerInfo

NAMESPACE = "swarmcore"
RANGES = 8
"""Index keys of one model: each is for the servers whose first block is in that eighth of the model."""

_SEQUENCE_BYTES = 8
_SIGNATURE_BYTES = 64
_SHA2_256 = b"\x12\x20"  # in front of an index key, as libp2p's multihashes have it


def record_key(peer: PeerId) -> bytes:
    """Where the record of ``peer`` is: 40 bytes of text, as py-libp2p loses keys above 50."""
    digest = hashlib.sha256(peer.encode()).digest()[:16]
    return f"/{NAMESPACE}/server/".encode() + base64.urlsafe_b64encode(digest).rstrip(b"=")


def directory_key() -> bytes:
    """Where a few servers of every model are listed."""
    return _index_key("directory")


def range_key(fingerprint: str, part: int) -> bytes:
    """Where the servers are listed whose first block is in the eighth ``part`` of a model."""
    return _index_key("model", fingerprint, str(part))


def range_keys(fingerprint: str) -> list[bytes]:
    """Where all servers of a model are listed; those without one have the fingerprint ``""`` and one key."""
    return [range_key(fingerprint, part) for part in range(RANGES if fingerprint else 1)]


def key_listing(info: ServerInfo) -> bytes:
    """The one range key under which ``info`` belongs."""
    if info.model is None:
        return range_key("", 0)
    start = info.span.start if info.span else 0
    return range_key(info.model.fingerprint, RANGES * start // max(1, info.model.blocks))


def _index_key(*words: str) -> bytes:
    text = "\0".join(("swarmcore index 1", *words))
    return _SHA2_256 + hashlib.sha256(text.encode()).digest()


def encode_value(record: SignedRecord) -> bytes:
    """``record`` as a value: its sequence number (8 bytes, big-endian), its signature, its payload."""
    sequence = decode_announcement(record).sequence
    return sequence.to_bytes(_SEQUENCE_BYTES, "big") + record.signature + record.payload


def sequence_of(value: bytes) -> int:
    """The number that ``value`` claims, by which one of several values is chosen; of garbage -1."""
    return int.from_bytes(value[:_SEQUENCE_BYTES], "big") if len(value) >= _SEQUENCE_BYTES else -1


def latest(values: Sequence[bytes]) -> int:
    """Which of ``values`` has the highest number; the last one of equals, so that it is stored afresh."""
    return max(range(len(values)), key=lambda i: (sequence_of(values[i]), values[i], i))


class RefusedValue(Exception):
    """A value that is not taken, and why."""

    def __init__(self, drop: Drop) -> None:
        super().__init__(f"the value is {drop}")
        self.drop = drop


class ValueRules:
    """Judges values before they are stored or believed, and counts those refused. A plain object.

    ``allowed`` are the peers of a closed swarm; None admits everyone.
    """

    def __init__(self, limits: RecordLimits, allowed: Collection[PeerId] | None = None) -> None:
        self.limits = limits
        self.dropped: Counter[Drop] = Counter()
        """How many values were refused, by reason."""
        self._allowed = None if allowed is None else frozenset(allowed)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Take values of ``peers`` alone from now on."""
        self._allowed = frozenset(peers)

    def check(self, key: bytes, value: bytes, now: float) -> SignedRecord:
        """The record in ``value``, found under ``key`` at ``now`` (seconds since the epoch).

        Raise `RefusedValue`, counted, unless it is sound, still holds, and is its owner's under its own key.
        """
        try:
            return self._check(key, value, now)
        except RefusedValue as refused:
            self.dropped[refused.drop] += 1
            raise

    def _check(self, key: bytes, value: bytes, now: float) -> SignedRecord:
        header = _SEQUENCE_BYTES + _SIGNATURE_BYTES
        if len(value) > header + self.limits.max_bytes:
            raise RefusedValue(Drop.OVERSIZED)
        record = SignedRecord(value[header:], value[_SEQUENCE_BYTES:header])
        try:
            announcement = decode_announcement(record)
            sound = may_announce(record)
        except ProtocolError as exc:
            raise RefusedValue(Drop.MALFORMED) from exc
        if not sound or announcement.sequence != sequence_of(value):
            raise RefusedValue(Drop.MALFORMED)
        if self._allowed is not None and announcement.peer not in self._allowed:
            raise RefusedValue(Drop.UNLISTED)
        if announcement.issued > now + self.limits.max_skew or announcement.ttl > self.limits.max_ttl:
            raise RefusedValue(Drop.SKEWED)
        if now >= self.end_of(announcement):
            raise RefusedValue(Drop.EXPIRED)
        if key != record_key(announcement.peer) or not is_signed_by(record, announcement.peer):
            raise RefusedValue(Drop.FORGED)
        return record

    def held_until(self, value: bytes, now: float) -> float:
        """When ``value``, sound and received at ``now``, is to be let go of.

        As for all records its ttl runs from receipt, so that clocks need not agree, but never past `end_of`.
        """
        header = _SEQUENCE_BYTES + _SIGNATURE_BYTES
        announcement = decode_announcement(SignedRecord(value[header:], value[_SEQUENCE_BYTES:header]))
        return min(now + announcement.ttl, self.end_of(announcement))

    def end_of(self, announcement: Announcement) -> float:
        """When nobody holds ``announcement`` any longer, however far its owner's clock is behind."""
        return announcement.issued + announcement.ttl + self.limits.max_skew
