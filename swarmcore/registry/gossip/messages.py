"""What registries say to each other: the records of the gossip methods and of the watch protocol."""

from __future__ import annotations

import attrs

from swarmcore.registry.gossip.records import RecordLimits, SignedRecord
from swarmcore.registry.gossip.suspicion import Suspected
from swarmcore.rpc import Method, Protocol
from swarmcore.types import PeerId
from swarmcore.wire.framing import wire_tag
from swarmcore.wire.limits import Limits


@wire_tag("CompareDigests")
@attrs.frozen
class CompareDigests:
    """Where do our records differ?"""

    hashes: bytes
    """The caller's digest: 256 hashes of 8 bytes."""


@wire_tag("DigestsCompared")
@attrs.frozen
class DigestsCompared:
    """What the answering peer holds in the buckets that differ."""

    buckets: tuple[int, ...]
    entries: bytes
    """Key (8 bytes) and sequence number (8 bytes, little-endian) of each record in these buckets."""
    clock: float
    """Seconds since the epoch on the answering peer's clock."""
    hidden: bytes = b""
    """Entries of the records whose owners it found dead."""


@wire_tag("ExchangeRecords")
@attrs.frozen
class ExchangeRecords:
    """Take ``records``, and send those I lack."""

    records: tuple[SignedRecord, ...] = ()
    wanted: bytes = b""
    """Keys of the records asked for, 8 bytes each."""
    spread: bool = False
    """Whether ``records`` are new: what of them is news to the receiver, it pushes on to others."""
    suspected: tuple[Suspected, ...] = ()
    """Suspicions, which are passed on likewise."""


@wire_tag("RecordsExchanged")
@attrs.frozen
class RecordsExchanged:
    """Those of the records asked for that the answering peer holds."""

    records: tuple[SignedRecord, ...] = ()


@wire_tag("WatchRecords")
@attrs.frozen
class WatchRecords:
    """Opens a channel on which the other side sends every record it takes, until the channel is closed."""

    hashes: bytes
    """The watcher's digest: what differs from it is sent first."""


@wire_tag("RecordBatch")
@attrs.frozen
class RecordBatch:
    """Records the watcher may lack. An empty batch is a sign of life."""

    records: tuple[SignedRecord, ...] = ()
    complete: bool = True
    """Whether the watcher now has everything the sender has."""
    suspected: bytes = b""
    """Entries of records whose owners are suspected to be dead: for the watcher to see for itself."""
    clock: float = 0.0
    """Seconds since the epoch on the sender's clock; 0 from peers that do not tell."""


@wire_tag("CheckAlive")
@attrs.frozen
class CheckAlive:
    """Are you alive?"""

    suspected: int = 0
    """Number of the callee's record under which it is suspected; 0 when it is not. A newer one refutes it."""


@wire_tag("StillAlive")
@attrs.frozen
class StillAlive:
    """Yes."""


@wire_tag("ReportSuspect")
@attrs.frozen
class ReportSuspect:
    """A watcher got no answer from ``peer``."""

    peer: PeerId
    sequence: int
    """Of its record."""


@wire_tag("SuspectReported")
@attrs.frozen
class SuspectReported:
    """The callee will see for itself, if it has not yet."""


@wire_tag("HoldLine")
@attrs.frozen
class OpenHeartbeats:
    """Opens a heartbeat channel: each side notices when the other one dies."""

    beat: float
    """Seconds between the heartbeats of both sides; 0 for none."""


@wire_tag("Beat")
@attrs.frozen
class Heartbeat:
    """A sign of life."""

    suspected: tuple[Suspected, ...] = ()
    """Suspicions to pass on."""
    hidden: int = 0
    """Number of the receiver's record if that counts as a dead peer's on this side; else 0."""


COMPARE = Method("/swarmcore/gossip/compare/1", CompareDigests, DigestsCompared)
EXCHANGE = Method("/swarmcore/gossip/exchange/1", ExchangeRecords, RecordsExchanged)
CHECK = Method("/swarmcore/gossip/check/1", CheckAlive, StillAlive)
REPORT = Method("/swarmcore/registry/report/1", ReportSuspect, SuspectReported)
HEARTBEATS = Protocol("/swarmcore/alive/1", (OpenHeartbeats,), (Heartbeat,), (Heartbeat,))
WATCH = Protocol("/swarmcore/registry/watch/1", (WatchRecords,), (), (RecordBatch,))


def records_per_message(limits: Limits, record_limits: RecordLimits) -> int:
    """How many records fit into one message whatever their sizes: 248 with the default limits."""
    framing, signature_and_framing = 1024, 128
    return max(1, (limits.max_header - framing) // (record_limits.max_bytes + signature_and_framing))
