"""What registries say to each other: the records of the gossip methods and of the watch protocol."""

from __future__ import annotations

import attrs

from swarmcore.registry.records import RecordLimits, SignedRecord
from swarmcore.rpc import Method, Protocol
from swarmcore.wire.limits import Limits


@attrs.frozen
class CompareDigests:
    """Where do our records differ?"""

    hashes: bytes
    """The caller's digest: 256 hashes of 8 bytes."""


@attrs.frozen
class DigestsCompared:
    """What the answering peer holds in the buckets that differ."""

    buckets: tuple[int, ...]
    entries: bytes
    """Key (8 bytes) and sequence number (8 bytes, little-endian) of each record in these buckets."""
    clock: float
    """Seconds since the epoch on the answering peer's clock."""


@attrs.frozen
class ExchangeRecords:
    """Take ``records``, and send those I lack."""

    records: tuple[SignedRecord, ...] = ()
    wanted: bytes = b""
    """Keys of the records asked for, 8 bytes each."""
    spread: bool = False
    """Whether ``records`` are new: what of them is news to the receiver, it pushes on to others."""


@attrs.frozen
class RecordsExchanged:
    """Those of the records asked for that the answering peer holds."""

    records: tuple[SignedRecord, ...] = ()


@attrs.frozen
class WatchRecords:
    """Opens a channel on which the other side sends every record it takes, until the channel is closed."""

    hashes: bytes
    """The watcher's digest: what differs from it is sent first."""


@attrs.frozen
class RecordBatch:
    """Records the watcher may lack. An empty batch is a sign of life."""

    records: tuple[SignedRecord, ...] = ()
    complete: bool = True
    """Whether the watcher now has everything the sender has."""


COMPARE = Method("/swarmcore/gossip/compare/1", CompareDigests, DigestsCompared)
EXCHANGE = Method("/swarmcore/gossip/exchange/1", ExchangeRecords, RecordsExchanged)
WATCH = Protocol("/swarmcore/registry/watch/1", (WatchRecords,), (), (RecordBatch,))


def records_per_message(limits: Limits, record_limits: RecordLimits) -> int:
    """How many records fit into one message whatever their sizes: 248 with the default limits."""
    framing, signature_and_framing = 1024, 128
    return max(1, (limits.max_header - framing) // (record_limits.max_bytes + signature_and_framing))
