from __future__ import annotations

from collections.abc import Callable

import pytest

from swarmcore.identity import Identity
from swarmcore.registry.gossip.records import RecordIssuer, RecordLimits, SignedRecord
from swarmcore.registry.gossip.store import Drop
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

pytest.importorskip("libp2p", reason="needs the extra libp2p")
from swarmcore_transports.libp2p_dht.records import (
    RANGES,
    RefusedValue,
    ValueRules,
    directory_key,
    encode_value,
    key_listing,
    latest,
    range_keys,
    record_key,
    sequence_of,
)

NOW = 1_700_000_000.0
OWNER, OTHER = Identity.from_seed(b"o" * 32), Identity.from_seed(b"x" * 32)
INFO = ServerInfo(OWNER.peer, (), public_name="owner")


def issue(info: ServerInfo = INFO, *, at: float = NOW, ttl: float = 60.0) -> SignedRecord:
    return RecordIssuer(OWNER, lambda: at).announce(info, ttl)


def refusal(value: bytes, *, key: bytes | None = None, rules: ValueRules | None = None) -> Drop:
    rules = rules or ValueRules(RecordLimits())
    with pytest.raises(RefusedValue) as refused:
        rules.check(key or record_key(OWNER.peer), value, NOW)
    assert rules.dropped == {refused.value.drop: 1}
    return refused.value.drop


def test_a_sound_value_is_the_record_that_was_put() -> None:
    rules, record = ValueRules(RecordLimits()), issue()
    assert rules.check(record_key(OWNER.peer), encode_value(record), NOW) == record
    assert not rules.dropped


def test_keys_are_short_enough_and_differ() -> None:
    keys = [
        record_key(OWNER.peer),
        record_key(OTHER.peer),
        directory_key(),
        *range_keys("f"),
        *range_keys(""),
    ]
    assert len(set(keys)) == len(keys) == 3 + RANGES + 1
    assert all(len(key) <= 50 for key in keys)


@pytest.mark.parametrize(
    ("spoil", "drop"),
    [
        (lambda value: value[:8] + bytes(64) + value[72:], Drop.FORGED),
        (lambda value: value.replace(b"zzzz", b"zzzy"), Drop.FORGED),
        (lambda value: (2**63).to_bytes(8, "big") + value[8:], Drop.MALFORMED),
        (lambda value: value[:40], Drop.MALFORMED),
        (lambda value: b"", Drop.MALFORMED),
        (lambda value: value + bytes(100_000), Drop.OVERSIZED),
    ],
    ids=["signature", "payload", "sequence", "cut", "empty", "enormous"],
)
def test_a_spoilt_value_is_refused_and_counted(spoil: Callable[[bytes], bytes], drop: Drop) -> None:
    value = encode_value(issue(ServerInfo(OWNER.peer, (), public_name="z" * 40)))
    assert refusal(spoil(value)) is drop


def test_a_value_under_anothers_key_is_forged() -> None:
    assert refusal(encode_value(issue()), key=record_key(OTHER.peer)) is Drop.FORGED


def test_what_has_ended_is_stale_and_what_is_of_the_future_is_refused() -> None:
    assert refusal(encode_value(issue(at=NOW - 91))) is Drop.EXPIRED
    assert refusal(encode_value(issue(at=NOW + 31))) is Drop.SKEWED


def test_strangers_to_a_closed_swarm_are_refused() -> None:
    assert refusal(encode_value(issue()), rules=ValueRules(RecordLimits(), {OTHER.peer})) is Drop.UNLISTED


def test_the_highest_number_wins_and_the_last_of_equals() -> None:
    old, new = encode_value(issue()), encode_value(issue(at=NOW + 1))
    assert sequence_of(new) == sequence_of(old) + 1000
    assert latest([new, old, b"short"]) == 0
    assert latest([old, old]) == 1


def test_a_value_ends_with_its_ttl_from_receipt_but_never_much_later() -> None:
    rules, value = ValueRules(RecordLimits()), encode_value(issue(ttl=60))
    assert rules.held_until(value, NOW - 5) == NOW + 55
    assert rules.held_until(value, NOW + 80) == NOW + 90


def test_a_server_is_listed_by_where_its_blocks_begin() -> None:
    model = ModelInfo("m", "f", 80, 64)

    def listed(start: int) -> bytes:
        return key_listing(ServerInfo(PeerId(OWNER.peer), (), model=model, span=Span(start, start + 1)))

    assert [listed(start) for start in (0, 9, 10, 79)] == [range_keys("f")[part] for part in (0, 0, 1, 7)]
    assert key_listing(INFO) == range_keys("")[0]
