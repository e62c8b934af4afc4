from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from swarmcore.errors import InputError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.records import (
    Announcement,
    RecordIssuer,
    RecordLimits,
    SignedRecord,
    check_info,
    decode_announcement,
    is_signed_by,
)
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span
from swarmcore.wire.framing import encode_record

IdentityOf = Callable[[int], Identity]
MODEL = ModelInfo("tiny", "f" * 64, blocks=12, hidden_size=64)


def full_info(peer: PeerId) -> ServerInfo:
    addresses = (f"tcp://192.0.2.7:31330/{peer}", f"libp2p:/ip4/192.0.2.7/tcp/4001/p2p/{peer}")
    return ServerInfo(
        peer,
        addresses,
        "online",
        MODEL,
        Span(0, 6),
        "bfloat16",
        8192,
        4096,
        3,
        21.5,
        900.0,
        public_name="attic",
    )


def test_a_record_says_what_was_announced_and_is_signed(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    issuer = RecordIssuer(me, lambda: 1_700_000_000.1234)
    record = issuer.announce(full_info(me.peer), ttl=30.0)
    assert decode_announcement(record) == Announcement(me.peer, 1_700_000_000_123, 30.0, full_info(me.peer))
    assert is_signed_by(record, me.peer)
    assert not is_signed_by(record, identity_of(2).peer)


def test_a_changed_payload_or_signature_is_noticed(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    record = RecordIssuer(me, lambda: 1e9).announce(full_info(me.peer), ttl=30.0)
    assert not is_signed_by(SignedRecord(record.payload + b"\0", record.signature), me.peer)
    assert not is_signed_by(SignedRecord(record.payload, bytes(64)), me.peer)
    assert not is_signed_by(SignedRecord(record.payload, b""), me.peer)


def test_a_bare_signature_over_the_payload_is_not_a_records(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    payload = encode_record(Announcement(me.peer, 1, 30.0))
    assert not is_signed_by(SignedRecord(payload, me.sign(payload)), me.peer)


def test_sequence_numbers_grow_even_when_the_clock_does_not(identity_of: IdentityOf) -> None:
    me, clock = identity_of(1), [1000.0]
    issuer = RecordIssuer(me, lambda: clock[0])
    info = full_info(me.peer)
    sequences = []
    for now in (1000.0, 1000.0, 990.0, 2000.0):
        clock[0] = now
        sequences.append(decode_announcement(issuer.announce(info, 30.0)).sequence)
    assert sequences == [1_000_000, 1_000_001, 1_000_002, 2_000_000]


def test_a_restarted_owner_supersedes_its_earlier_life(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    earlier = RecordIssuer(me, lambda: 1000.0).announce(full_info(me.peer), 30.0)
    issuer = RecordIssuer(me, lambda: 980.0)  # its clock was set back meanwhile
    issuer.supersede(decode_announcement(earlier).sequence)
    assert decode_announcement(issuer.announce(full_info(me.peer), 30.0)).sequence == 1_000_001


def test_a_clock_that_was_far_ahead_is_believed_once_it_is_set_right(identity_of: IdentityOf) -> None:
    me, clock = identity_of(1), [5000.0]
    issuer = RecordIssuer(me, lambda: clock[0])
    issuer.announce(full_info(me.peer), 30.0)
    clock[0] = 1000.0
    assert decode_announcement(issuer.announce(full_info(me.peer), 30.0)).sequence == 1_000_000
    assert decode_announcement(issuer.announce(full_info(me.peer), 30.0)).sequence == 1_000_001


def test_a_withdrawal_outlives_what_it_withdraws(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    issuer = RecordIssuer(me, lambda: 1000.0)
    issuer.announce(full_info(me.peer), 300.0)
    issuer.announce(full_info(me.peer), 30.0)
    withdrawal = decode_announcement(issuer.withdraw())
    assert withdrawal.info is None
    assert withdrawal.ttl == 300.0


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf"), 3601.0])
def test_an_unreasonable_ttl_is_refused(identity_of: IdentityOf, ttl: float) -> None:
    me = identity_of(1)
    with pytest.raises(InputError, match="ttl"):
        RecordIssuer(me, lambda: 1000.0).announce(full_info(me.peer), ttl)


def test_an_announcement_above_the_size_limit_is_refused(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    issuer = RecordIssuer(me, lambda: 1000.0, RecordLimits(max_bytes=400))
    with pytest.raises(InputError, match="fewer addresses"):
        issuer.announce(full_info(me.peer), 30.0)


def test_only_oneself_can_be_announced(identity_of: IdentityOf) -> None:
    with pytest.raises(InputError, match="in the name of"):
        RecordIssuer(identity_of(1), lambda: 1000.0).announce(full_info(identity_of(2).peer), 30.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"addresses": ("tcp://host:1",)},
        {"addresses": ("tcp://host:1/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8",)},
        {"addresses": ("tcp://host:1/{peer}",) * 17},
        {"public_name": "\x1b[2Jcleared"},
        {"public_name": "n" * 257},
        {"cache_tokens": -1},
        {"sessions": 2**60},
        {"decode_rps": float("nan")},
        {"forward_rps": float("inf")},
        {"span": Span(0, 13)},
        {"span": Span(5, 5)},
        {"span": Span(-1, 5)},
        {"model": None},
        {"model": attrs.evolve(MODEL, blocks=10**9)},
        {"model": attrs.evolve(MODEL, name="two\nlines")},
        {"heads": (MODEL,) * 5},
        {"numerics": "torch"},
        {"numerics": "torch/" + "x" * 100},
        {"capabilities": ("training",) * 9},
        {"capabilities": ("two\nlines",)},
        {"heads": (attrs.evolve(MODEL, name="two\nlines"),)},
        {"heads": (attrs.evolve(MODEL, blocks=10**9),)},
    ],
    ids=str,
)
def test_what_no_peer_may_announce(identity_of: IdentityOf, wrong: dict[str, object]) -> None:
    peer = identity_of(1).peer
    if addresses := wrong.get("addresses"):
        assert isinstance(addresses, tuple)
        wrong = {"addresses": tuple(a.format(peer=peer) for a in addresses)}
    check_info(full_info(peer), peer)
    with pytest.raises(InputError):
        check_info(attrs.evolve(full_info(peer), **wrong), peer)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", encode_record({"peer": "x"}), encode_record({"peer": "x", "sequence": -1, "ttl": 1.0})],
    ids=["empty", "no msgpack", "incomplete", "negative"],
)
def test_malformed_payloads(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_announcement(SignedRecord(payload, bytes(64)))


def test_unknown_fields_are_passed_over(identity_of: IdentityOf) -> None:
    me = identity_of(1)
    payload = encode_record({"peer": me.peer, "sequence": 5, "ttl": 1.0, "colour": "red"})
    assert decode_announcement(SignedRecord(payload, b"")) == Announcement(me.peer, 5, 1.0)
