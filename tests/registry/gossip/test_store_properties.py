"""What holds for a store whatever arrives, in whatever order."""

from __future__ import annotations

from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swarmcore.identity import Identity
from swarmcore.registry.gossip.digest import BUCKETS
from swarmcore.registry.gossip.records import RecordIssuer, SignedRecord, decode_announcement
from swarmcore.registry.gossip.store import Accepted, RecordStore
from swarmcore.types import PeerId, ServerInfo

NOW = 1_700_000_000.0
PEERS = 4

record_choices = st.tuples(
    st.integers(1, PEERS), st.integers(0, 40), st.sampled_from(["a", "b", None]), st.sampled_from([5.0, 60.0])
)


@cache
def make_record(peer: int, second: int, name: str | None, ttl: float) -> SignedRecord:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(peer.to_bytes(32, "little")))
    # Two different records never share a sequence number: an owner does not issue such.
    offset = ("a", "b", None).index(name) * 2 + (ttl > 5.0)
    issuer = RecordIssuer(identity, lambda: NOW + second + offset / 1000)
    if name is None:
        return issuer.withdraw()
    return issuer.announce(ServerInfo(identity.peer, (), public_name=name), ttl)


@given(st.lists(record_choices, max_size=30), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(
    choices: list[tuple[int, int, str | None, float]], rng: object
) -> None:
    records = [make_record(*choice) for choice in choices]
    shuffled = records + records[: len(records) // 2]
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = RecordStore(), RecordStore()
    for record in records:
        one.apply(record, NOW + 40)
    for record in shuffled:
        other.apply(record, NOW + 40)
    assert dict(one.view().servers) == dict(other.view().servers)
    assert one.hashes() == other.hashes()


# A number is forgotten before a record of the same owner that was issued earlier, for longer, has expired.
@example([(1, 0, "b", 5.0), 20.0, 16.0, (1, 0, "a", 60.0)])
@given(
    st.lists(
        st.one_of(
            record_choices,
            st.floats(0.0, 20.0),
            st.builds(SignedRecord, st.binary(max_size=200), st.binary(max_size=64)),
        ),
        max_size=60,
    )
)
def test_changes_tell_the_view_and_sequences_only_grow_while_remembered(
    events: list[tuple[int, int, str | None, float] | float | SignedRecord],
) -> None:
    store, now = RecordStore(capacity=PEERS - 1), NOW
    applied: dict[PeerId, ServerInfo] = {}
    newest: dict[PeerId, tuple[int, float]] = {}
    """The highest number that was taken, and the moment until which it has to be remembered."""
    for event in events:
        changes = []
        if isinstance(event, float):
            now += event
            changes = store.expire(now)
            due = store.next_due()
            assert due is None or due > now
        else:
            record = event if isinstance(event, SignedRecord) else make_record(*event)
            outcome = store.apply(record, now)
            if isinstance(outcome, Accepted):
                new = outcome.announcement
                highest, remembered = newest.get(new.peer, (-1, 0.0))
                assert new.sequence > highest or now >= remembered
                end = new.issued + new.ttl + store.limits.max_skew
                newest[new.peer] = new.sequence, max(end, remembered)
                changes = [outcome.change] if outcome.change else []
        for change in changes:
            assert (change.info.peer in applied) == (change.kind != "joined")
            if change.kind == "left":
                assert applied.pop(change.info.peer) == change.info
            else:
                applied[change.info.peer] = change.info
        assert applied == dict(store.view().servers)
        assert len(store) <= PEERS - 1


@settings(max_examples=60)
@given(st.lists(record_choices, max_size=20), st.lists(record_choices, max_size=20))
def test_one_exchange_of_differences_makes_two_stores_equal(
    left: list[tuple[int, int, str | None, float]], right: list[tuple[int, int, str | None, float]]
) -> None:
    one, other = RecordStore(), RecordStore()
    for choice in left:
        one.apply(make_record(*choice), NOW + 40)
    for choice in right:
        other.apply(make_record(*choice), NOW + 40)
    buckets = one.differing(other.hashes())
    wanted, offered = one.compare(buckets, list(other.entries(buckets)))
    for record in list(other.current(wanted)):
        assert isinstance(one.apply(record, NOW + 40), Accepted)
    for record in list(one.current(offered)):
        assert isinstance(other.apply(record, NOW + 40), Accepted)
    assert one.hashes() == other.hashes()
    assert dict(one.view().servers) == dict(other.view().servers)
    assert dict(one.entries(range(BUCKETS))) == dict(other.entries(range(BUCKETS)))


def test_sequences_used_here_are_distinct() -> None:
    made = [make_record(1, s, n, t) for s in range(41) for n in ("a", "b", None) for t in (5.0, 60.0)]
    assert len({decode_announcement(record).sequence for record in made}) == len(made)
