from __future__ import annotations

import gc

from hypothesis import given
from hypothesis import strategies as st

from swarmcore.registry.base import Change
from swarmcore.registry.changes import ChangeFeed, merged
from swarmcore.types import PeerId, ServerInfo


def history(events: list[tuple[str, int | None]]) -> list[Change]:
    """The changes of a view in which each event sets what a peer announces, or removes it (None)."""
    view: dict[str, ServerInfo] = {}
    changes = []
    for peer, sessions in events:
        before = view.pop(peer, None)
        if sessions is not None:
            view[peer] = ServerInfo(PeerId(peer), (), sessions=sessions)
            changes.append(Change("updated" if before else "joined", view[peer]))
        elif before is not None:
            changes.append(Change("left", before))
    return changes


def applied(view: dict[PeerId, ServerInfo], changes: list[Change]) -> dict[PeerId, ServerInfo]:
    view = dict(view)
    for change in changes:
        assert (change.info.peer in view) == (change.kind != "joined")
        if change.kind == "left":
            del view[change.info.peer]
        else:
            view[change.info.peer] = change.info
    return view


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 5))), st.integers(0, 20))
def test_merged_changes_lead_to_the_same_view(events: list[tuple[str, int | None]], read: int) -> None:
    changes = history(events)
    seen = applied({}, changes[:read])
    short = merged(changes[read:])
    assert applied(seen, short) == applied({}, changes)
    assert len({change.info.peer for change in short}) == len(short)


async def test_a_reader_far_behind_holds_a_bounded_number_of_changes() -> None:
    feed = ChangeFeed(bound=10)
    reader = feed.reader()
    changes = history([(peer, n) for n in range(1000) for peer in "abc"])
    for change in changes:
        feed.publish(change)
        assert len(reader._waiting) <= 10
    feed.close()
    assert applied({}, [change async for change in reader]) == applied({}, changes)


async def test_more_peers_than_the_bound_are_all_told() -> None:
    feed = ChangeFeed(bound=10)
    reader = feed.reader()
    changes = history([(str(n), k) for k in range(20) for n in range(50)])
    for change in changes:
        feed.publish(change)
        assert len(reader._waiting) <= 100
    feed.close()
    assert applied({}, [change async for change in reader]) == applied({}, changes)


async def test_a_reader_that_is_dropped_is_forgotten() -> None:
    feed = ChangeFeed()
    reader = feed.reader()
    assert len(feed._readers) == 1
    del reader
    gc.collect()
    assert len(feed._readers) == 0
