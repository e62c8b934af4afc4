from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from swarmcore.errors import ProtocolError
from swarmcore.identity import Identity
from swarmcore.registry.base import Change
from swarmcore.registry.gossip.digest import BUCKETS, key_of
from swarmcore.registry.gossip.records import Announcement, RecordIssuer, SignedRecord
from swarmcore.registry.gossip.store import Accepted, Drop, RecordStore
from swarmcore.types import PeerId, ServerInfo
from swarmcore.wire.framing import encode_record

IdentityOf = Callable[[int], Identity]
NOW = 1_700_000_000.0


class Owner:
    """A peer that issues records at times of its choosing."""

    def __init__(self, identity: Identity) -> None:
        self.peer = identity.peer
        self.now = NOW
        self.issuer = RecordIssuer(identity, lambda: self.now)

    def info(self, name: str = "") -> ServerInfo:
        return ServerInfo(self.peer, (f"tcp://192.0.2.1:1/{self.peer}",), public_name=name)

    def announce(self, name: str = "", *, at: float = NOW, ttl: float = 30.0) -> SignedRecord:
        self.now = at
        return self.issuer.announce(self.info(name), ttl)

    def withdraw(self, *, at: float = NOW) -> SignedRecord:
        self.now = at
        return self.issuer.withdraw()


@pytest.fixture
def owner(identity_of: IdentityOf) -> Owner:
    return Owner(identity_of(1))


def change_of(outcome: Accepted | Drop) -> Change | None:
    assert isinstance(outcome, Accepted)
    return outcome.change


def test_a_peer_joins_updates_and_leaves(owner: Owner) -> None:
    store = RecordStore()
    assert change_of(store.apply(owner.announce("a"), NOW)) == Change("joined", owner.info("a"))
    assert change_of(store.apply(owner.announce("b", at=NOW + 1), NOW + 1)) == Change(
        "updated", owner.info("b")
    )
    assert change_of(store.apply(owner.withdraw(at=NOW + 2), NOW + 2)) == Change("left", owner.info("b"))
    assert store.view().revision == 3
    assert not store.view().servers
    assert not store.dropped


def test_a_record_that_says_the_same_again_prolongs_without_a_change(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    view = store.view()
    assert change_of(store.apply(owner.announce("a", at=NOW + 20), NOW + 20)) is None
    assert store.view() is view
    assert store.expire(NOW + 31) == []
    assert store.expire(NOW + 50) == [Change("left", owner.info("a"))]


def test_a_view_does_not_change(owner: Owner, identity_of: IdentityOf) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    view = store.view()
    store.apply(Owner(identity_of(2)).announce(), NOW)
    store.apply(owner.withdraw(at=NOW + 1), NOW + 1)
    assert list(view) == [owner.info("a")]
    with pytest.raises(TypeError):
        view.servers[owner.peer] = owner.info()  # type: ignore[index]


def test_a_forged_record_is_dropped(owner: Owner, identity_of: IdentityOf) -> None:
    store = RecordStore()
    genuine = owner.announce()
    mallory = identity_of(666)
    resigned = SignedRecord(genuine.payload, mallory.sign(b"swarmcore registry record 1\0" + genuine.payload))
    assert store.apply(resigned, NOW) is Drop.FORGED
    assert store.apply(SignedRecord(genuine.payload, b"short"), NOW) is Drop.FORGED
    assert store.dropped == {Drop.FORGED: 2}
    assert not store.view().servers


def test_one_key_cannot_appear_under_two_names(owner: Owner) -> None:
    store = RecordStore()
    alias = PeerId(owner.peer + " ")
    payload = encode_record(Announcement(alias, int(NOW * 1000), 30.0, ServerInfo(alias, ())))
    signature = owner.issuer._identity.sign(b"swarmcore registry record 1\0" + payload)
    assert store.apply(SignedRecord(payload, signature), NOW) is Drop.FORGED


def test_replays_are_dropped_while_live_after_withdrawal_and_after_expiry(owner: Owner) -> None:
    store = RecordStore()
    old, new = owner.announce("old"), owner.announce("new", at=NOW + 1)
    store.apply(new, NOW + 1)
    assert store.apply(old, NOW + 1) is Drop.REPLAYED
    assert store.apply(new, NOW + 1) is Drop.KNOWN
    store.apply(owner.withdraw(at=NOW + 2), NOW + 2)
    assert store.apply(new, NOW + 2) is Drop.REPLAYED

    store = RecordStore()
    store.apply(new, NOW + 1)
    store.expire(NOW + 40)
    assert store.apply(new, NOW + 40) is Drop.REPLAYED
    store.expire(NOW + 3600)
    assert len(store) == 0
    assert store.apply(new, NOW + 3600) is Drop.EXPIRED
    assert store.dropped == {Drop.REPLAYED: 1, Drop.EXPIRED: 1}


def test_a_replay_is_still_refused_when_a_shorter_ttl_followed_a_longer_one(owner: Owner) -> None:
    store = RecordStore()
    long = owner.announce("long", ttl=600.0)
    store.apply(long, NOW)
    store.apply(owner.announce("short", at=NOW + 1, ttl=10.0), NOW + 1)
    assert [c.kind for c in store.expire(NOW + 12)] == ["left"]
    store.expire(NOW + 100)
    assert store.apply(long, NOW + 100) is Drop.REPLAYED


def test_a_record_handed_around_does_not_live_on(owner: Owner) -> None:
    """Received at its very end, a record lasts no longer than its signature and the clocks' skew allow."""
    store = RecordStore()
    store.apply(owner.announce(ttl=30.0), NOW + 59)
    assert [c.kind for c in store.expire(NOW + 60)] == ["left"]


def test_an_owner_whose_clock_is_behind_is_not_dead_on_arrival(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce(at=NOW - 25, ttl=15.0), NOW)
    assert store.expire(NOW + 14) == []
    assert [c.kind for c in store.expire(NOW + 20)] == ["left"]


def test_skewed_expired_oversized_malformed_unlisted(owner: Owner, identity_of: IdentityOf) -> None:
    store = RecordStore(allowed=[owner.peer])
    ahead = owner.announce(at=NOW + 31)
    assert store.apply(ahead, NOW) is Drop.SKEWED
    assert store.apply(ahead, NOW + 1) == Accepted(
        Announcement(owner.peer, int((NOW + 31) * 1000), 30.0, owner.info()), Change("joined", owner.info())
    )
    fresh = Owner(identity_of(1))
    assert store.apply(fresh.announce(at=NOW - 61), NOW) is Drop.EXPIRED
    assert store.apply(SignedRecord(bytes(5000), bytes(64)), NOW) is Drop.OVERSIZED
    assert store.apply(SignedRecord(b"junk", bytes(64)), NOW) is Drop.MALFORMED
    assert store.apply(Owner(identity_of(2)).announce(), NOW) is Drop.UNLISTED
    lasting = encode_record(Announcement(owner.peer, int(NOW * 1000), 1e9))
    assert store.apply(SignedRecord(lasting, bytes(64)), NOW) is Drop.SKEWED
    assert store.dropped == dict.fromkeys(
        [Drop.EXPIRED, Drop.OVERSIZED, Drop.MALFORMED, Drop.UNLISTED], 1
    ) | {Drop.SKEWED: 2}
    assert repr(store) == (
        "<RecordStore 1 live · 1/10000 held · 1 expired · 1 malformed · 1 oversized · 2 skewed · 1 unlisted>"
    )


def test_signed_nonsense_is_malformed(owner: Owner) -> None:
    nonsense = attrs.evolve(owner.info(), public_name="\x1b[31mred")
    payload = encode_record(Announcement(owner.peer, int(NOW * 1000), 30.0, nonsense))
    signature = owner.issuer._identity.sign(b"swarmcore registry record 1\0" + payload)
    assert RecordStore().apply(SignedRecord(payload, signature), NOW) is Drop.MALFORMED


def test_a_flood_of_identities_does_not_displace_known_servers(identity_of: IdentityOf) -> None:
    mine = Owner(identity_of(99))
    store = RecordStore(capacity=10, own=mine.peer)
    known = [Owner(identity_of(n)) for n in range(1, 11)]
    for server in known:
        store.apply(server.announce("x"), NOW)
    for n in range(100, 130):
        assert store.apply(Owner(identity_of(n)).announce(), NOW) is Drop.FULL
    assert change_of(store.apply(known[3].announce("y", at=NOW + 1), NOW + 1)) is not None
    assert change_of(store.apply(mine.announce(), NOW)) is not None
    assert set(store.view().servers) == {server.peer for server in [*known, mine]}
    store.expire(NOW + 3600)  # room again
    assert change_of(store.apply(Owner(identity_of(200)).announce(at=NOW + 3600), NOW + 3600)) is not None


def test_next_due_is_when_expire_has_something_to_do(owner: Owner) -> None:
    store = RecordStore()
    assert store.next_due() is None
    store.apply(owner.announce(ttl=30.0), NOW)
    assert store.next_due() == NOW + 30
    store.expire(NOW + 30)
    assert store.next_due() == NOW + 60
    store.expire(NOW + 60)
    assert store.next_due() is None


def test_alternating_ttls_do_not_pile_up(owner: Owner) -> None:
    store = RecordStore()
    for step in range(500):
        at = NOW + step / 1000
        store.apply(owner.announce(at=at, ttl=3600.0 if step % 2 else 30.0), at)
    assert len(store._due) < 100


def test_two_stores_find_their_differences(identity_of: IdentityOf) -> None:
    left, right = RecordStore(), RecordStore()
    owners = [Owner(identity_of(n)) for n in range(1, 60)]
    for server in owners:
        record = server.announce("same")
        left.apply(record, NOW)
        right.apply(record, NOW)
    assert left.hashes() == right.hashes()
    assert left.differing(right.hashes()) == set()

    left.apply(owners[0].announce("news", at=NOW + 1), NOW + 1)
    right.apply(owners[1].withdraw(at=NOW + 1), NOW + 1)
    newcomer = Owner(identity_of(100))
    right.apply(newcomer.announce(at=NOW + 1), NOW + 1)
    buckets = left.differing(right.hashes())
    assert buckets == {key_of(o.peer)[0] for o in (owners[0], owners[1], newcomer)}
    wanted, offered = left.compare(buckets, right.entries(buckets))
    assert set(wanted) == {key_of(owners[1].peer), key_of(newcomer.peer)}
    assert set(offered) == {key_of(owners[0].peer)}

    for record in right.current(wanted):
        left.apply(record, NOW + 1)
    for record in left.current(offered):
        right.apply(record, NOW + 1)
    assert left.hashes() == right.hashes()
    assert dict(left.view().servers) == dict(right.view().servers)


def test_what_expired_here_is_neither_asked_for_nor_offered_again(owner: Owner) -> None:
    early, late = RecordStore(), RecordStore()
    record = owner.announce(ttl=30.0)
    early.apply(record, NOW)
    late.apply(record, NOW + 20)
    early.expire(NOW + 35)
    late.expire(NOW + 35)
    buckets = early.differing(late.hashes())
    assert buckets
    assert early.compare(buckets, late.entries(buckets)) == ([], [])
    assert late.compare(buckets, early.entries(buckets)) == ([], [])


def test_a_full_store_asks_for_no_more_than_it_can_hold(identity_of: IdentityOf) -> None:
    small, large = RecordStore(capacity=3), RecordStore()
    for n in range(1, 20):
        large.apply(Owner(identity_of(n)).announce(), NOW)
    everything = range(BUCKETS)
    wanted, _ = small.compare(everything, large.entries(everything))
    assert len(wanted) == 3


def test_a_digest_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ProtocolError):
        RecordStore().differing(b"short")


def test_a_hidden_peer_leaves_the_view_but_not_the_digest(owner: Owner) -> None:
    store, other = RecordStore(), RecordStore()
    record = owner.announce("a")
    store.apply(record, NOW)
    other.apply(record, NOW)
    sequence = store.sequence(owner.peer)
    assert sequence is not None
    assert store.hide(owner.peer, sequence - 1, NOW) is None
    assert store.hide(owner.peer, sequence, NOW) == Change("left", owner.info("a"))
    assert store.hide(owner.peer, sequence, NOW) is None
    assert (store.sequence(owner.peer), store.hidden_sequence(owner.peer)) == (None, sequence)
    assert store.apply(record, NOW) is Drop.KNOWN
    assert not store.view().servers
    assert not other.differing(store.hashes())
    assert other.shown_among(store.hidden_entries()) == [(owner.peer, sequence)]


def test_a_newer_record_shows_a_hidden_peer_again(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW)
    again = owner.announce("a", at=NOW + 1)
    assert change_of(store.apply(again, NOW + 1)) == Change("joined", owner.info("a"))
    assert store.hidden_entries() == []
    store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW)
    assert store.unhide(owner.peer) == Change("joined", owner.info("a"))
    assert store.unhide(owner.peer) is None


def test_news_from_before_its_end_does_not_show_a_hidden_peer(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW + 5)
    late = store.apply(owner.announce("b", at=NOW + 4), NOW + 6)
    assert isinstance(late, Accepted)
    assert late.doubtful and late.change is None
    assert owner.peer not in store.view().servers
    assert store.hidden_sequence(owner.peer) == late.announcement.sequence
    again = owner.announce("b", at=NOW + 5.5)
    assert change_of(store.apply(again, NOW + 6)) == Change("joined", owner.info("b"))


def test_who_is_found_dead_is_hidden_with_all_issued_before(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    suspected = store.sequence(owner.peer) or 0
    store.apply(owner.announce("b", at=NOW + 4), NOW + 4)
    assert store.hide(owner.peer, suspected, NOW + 5, issued_before=NOW + 3) is None
    change = store.hide(owner.peer, suspected, NOW + 5, issued_before=NOW + 4.5)
    assert change == Change("left", owner.info("b"))


def test_a_hidden_peer_that_withdraws_or_expires_changes_nothing(owner: Owner) -> None:
    store = RecordStore()
    store.apply(owner.announce("a"), NOW)
    store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW)
    assert change_of(store.apply(owner.withdraw(at=NOW + 1), NOW + 1)) is None
    assert store.hidden_entries() == []
    store = RecordStore()
    store.apply(owner.announce("b", at=NOW + 2), NOW + 2)
    store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW)
    assert store.expire(NOW + 3600) == []
    assert (store.hidden_entries(), store.unhide(owner.peer)) == ([], None)


def test_ones_own_record_is_never_hidden(owner: Owner) -> None:
    store = RecordStore(own=owner.peer)
    store.apply(owner.announce(), NOW)
    assert store.hide(owner.peer, store.sequence(owner.peer) or 0, NOW) is None
