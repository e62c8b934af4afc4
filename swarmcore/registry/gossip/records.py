"""Signed records: what a peer says of itself, in a form that others pass on but cannot alter.

A record is a msgpack payload and the owner's Ed25519 signature over it. Its sequence number is the time of
issue, so that the records of a restarted owner supersede those of its earlier life without any state on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import attrs

from swarmcore.errors import AddressError, InputError, ProtocolError
from swarmcore.identity import Identity, verify
from swarmcore.types import Address, ModelInfo, Numerics, PeerId, ServerInfo
from swarmcore.wire.framing import decode_record, encode_record
from swarmcore.wire.limits import MAX_ADDRESSES

# Signed in front of the payload, so that no signature made for another purpose passes as a record.
_DOMAIN = b"swarmcore registry record 1\0"

MAX_TEXT = 256
MAX_BLOCKS = 100_000
MAX_RTTS = 16
MAX_RUNS = 16
MAX_HEADS = 4
MAX_CAPABILITIES = 8

# What a record says and whether it is sound depends on its bytes alone. Each arrives by several ways, and at
# every member where many run in one process.
_REMEMBERED = 4096


@attrs.frozen
class RecordLimits:
    """What a record may claim. All peers of a swarm have to agree on these."""

    max_bytes: int = 4096
    """Largest payload, in bytes."""
    max_ttl: float = 3600.0
    """Longest life of a record, in seconds."""
    max_skew: float = 30.0
    """How far two peers' clocks may differ, in seconds."""


@attrs.frozen
class SignedRecord:
    """A record as it travels. Its payload is passed on byte for byte, fields unknown here included."""

    payload: bytes
    """An `Announcement` as msgpack."""
    signature: bytes
    """The owner's signature, 64 bytes."""

    @property
    def nbytes(self) -> int:
        return len(self.payload) + len(self.signature)


@attrs.frozen
class Announcement:
    """What a record says: ``peer`` announces ``info``, or withdraws what it announced before."""

    peer: PeerId
    sequence: int
    """When it was issued, in milliseconds since the epoch on the owner's clock; grows with every record."""
    ttl: float
    """Seconds from its issue in which it holds."""
    info: ServerInfo | None = None
    """None withdraws."""

    @property
    def issued(self) -> float:
        """Time of issue in seconds since the epoch."""
        return self.sequence / 1000


def decode_announcement(record: SignedRecord) -> Announcement:
    """What ``record`` says, its signature unchecked. Raise `ProtocolError` when it is malformed."""
    announcement = _decode(record.payload)
    if isinstance(announcement, str):
        raise ProtocolError(announcement)
    return announcement


def issued_at(record: SignedRecord) -> float | None:
    """When ``record`` says that it was issued, in seconds since the epoch; None when it is malformed."""
    announcement = _decode(record.payload)
    return None if isinstance(announcement, str) else announcement.issued


@lru_cache(maxsize=_REMEMBERED)
def _decode(payload: bytes) -> Announcement | str:
    try:
        announcement: Announcement = decode_record(payload, Announcement)
    except ProtocolError as exc:
        return exc.message
    if announcement.sequence < 0 or not 0 < announcement.ttl < math.inf:
        return "a record's sequence number and ttl have to be positive"
    return announcement


@lru_cache(maxsize=_REMEMBERED)
def is_signed_by(record: SignedRecord, peer: PeerId) -> bool:
    """Whether ``peer`` signed ``record``."""
    return verify(peer, _DOMAIN + record.payload, record.signature)


@lru_cache(maxsize=_REMEMBERED)
def may_announce(record: SignedRecord) -> bool:
    """Whether what ``record`` says passes `check_info`. Raise `ProtocolError` when it is malformed."""
    announcement = decode_announcement(record)
    try:
        if announcement.info is not None:
            check_info(announcement.info, announcement.peer)
    except InputError:
        return False
    return True


def check_info(info: ServerInfo, peer: PeerId) -> None:
    """Raise `InputError` unless ``info`` is something that ``peer`` may announce.

    Whoever reads a view relies on this: spans lie within their model, numbers are finite and not negative,
    text is printable and short, addresses are well-formed and lead to the peer itself.
    """
    if info.peer != peer:
        raise InputError(f"peer {peer} cannot announce in the name of {info.peer}")
    if len(info.addresses) > MAX_ADDRESSES:
        raise InputError(f"{len(info.addresses)} addresses announced, more than {MAX_ADDRESSES}")
    for address in info.addresses:
        _check_text("address", address)
        try:
            target = Address.parse(address).peer
        except AddressError as exc:
            raise InputError(f"an announced address is malformed: {exc}") from exc
        if target != peer:
            raise InputError(f"address {address} leads to another peer than the one that announces it")
    _check_fields(info)
    if len(info.rtts) > MAX_RTTS or not all(0 <= rtt.seconds < math.inf for rtt in info.rtts):
        raise InputError(f"round trips are announced for {MAX_RTTS} peers at most, finite and not negative")
    if len(info.runs) > MAX_RUNS:
        raise InputError(f"{len(info.runs)} training runs announced, more than {MAX_RUNS}")
    for run in info.runs:
        _check_text("name of a run", run)
    if len(info.heads) > MAX_HEADS:
        raise InputError(f"text of {len(info.heads)} models offered, more than {MAX_HEADS}")
    for model in (*info.heads, *([info.model] if info.model is not None else [])):
        _check_fields(model)
        if model.blocks > MAX_BLOCKS:
            raise InputError(f"a model of {model.blocks} blocks is above the limit of {MAX_BLOCKS}")
    if len(info.capabilities) > MAX_CAPABILITIES:
        raise InputError(f"{len(info.capabilities)} capabilities announced, more than {MAX_CAPABILITIES}")
    for capability in info.capabilities:
        _check_text("capability", capability)
    if info.numerics:
        Numerics.parse(info.numerics)
    for span in (info.span, info.target):
        if span is not None and (info.model is None or not info.model.span.covers(span)):
            raise InputError(f"blocks {span} are not within an announced model")


def _check_fields(record: ServerInfo | ModelInfo) -> None:
    for name, value in attrs.asdict(record, recurse=False).items():
        if isinstance(value, str):
            _check_text(name, value)
        elif isinstance(value, int | float) and not 0 <= value < 2**53:  # NaN fails this, too
            raise InputError(f"{name} is announced as {value}; it has to be finite and not negative")


def _check_text(name: str, value: str) -> None:
    # Printable only: these strings end up in other people's terminals and logs.
    if len(value) > MAX_TEXT or not value.isprintable():
        raise InputError(f"{name} has to be printable and at most {MAX_TEXT} characters long")


def without_load(info: ServerInfo) -> ServerInfo:
    """``info`` but for what comes and goes with a server's work."""
    return attrs.evolve(
        info, cache_tokens_free=0, sessions=0, decode_rps=0.0, forward_rps=0.0, queue_seconds=0.0, rtts=()
    )


class RecordIssuer:
    """Issues one peer's records, each superseding all before it.

    ``wall_clock`` gives seconds since the epoch. Where it stands still or is set back, sequence numbers go on
    from the last one by single steps; set back by more than clocks may differ, they start again from the new
    time, because nobody whose clock is right has taken records from so far ahead.
    """

    def __init__(
        self, identity: Identity, wall_clock: Callable[[], float], limits: RecordLimits | None = None
    ) -> None:
        self.peer = identity.peer
        self.last_sequence = 0
        self._identity = identity
        self._wall_clock = wall_clock
        self._limits = limits or RecordLimits()
        self._longest_ttl = 0.0

    def announce(self, info: ServerInfo, ttl: float) -> SignedRecord:
        """A record of ``info`` that holds for ``ttl`` seconds.

        Raise `InputError` when ``info`` may not be announced by this peer or ``ttl`` or the size of the
        record is over the limit.
        """
        check_info(info, self.peer)
        if not 0 < ttl <= self._limits.max_ttl:
            raise InputError(f"ttl of {ttl} s is not between 0 and {self._limits.max_ttl:g} s")
        record = self._sign(Announcement(self.peer, self._next_sequence(), ttl, info))
        if len(record.payload) > self._limits.max_bytes:
            raise InputError(
                f"the announcement takes {len(record.payload)} bytes, above the limit of "
                f"{self._limits.max_bytes}; announce fewer addresses or shorter names"
            )
        self._longest_ttl = max(self._longest_ttl, ttl)
        return record

    def withdraw(self) -> SignedRecord:
        """A record that takes back all before it; it holds for as long as any of them could be replayed."""
        ttl = self._longest_ttl or self._limits.max_ttl
        return self._sign(Announcement(self.peer, self._next_sequence(), ttl))

    def supersede(self, sequence: int) -> None:
        """Number the following records above ``sequence``, seen on a record of an earlier life."""
        self.last_sequence = max(self.last_sequence, sequence)

    def _next_sequence(self) -> int:
        now = int(self._wall_clock() * 1000)
        set_back = self.last_sequence > now + self._limits.max_skew * 1000
        self.last_sequence = now if set_back else max(self.last_sequence + 1, now)
        return self.last_sequence

    def _sign(self, announcement: Announcement) -> SignedRecord:
        payload = encode_record(announcement)
        return SignedRecord(payload, self._identity.sign(_DOMAIN + payload))
