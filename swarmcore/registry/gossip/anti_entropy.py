"""Anti-entropy: two members find the records that one of them lacks, and bring each other up to date."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from swarmcore.registry.gossip.digest import Key, pack_entries, split_keys, unpack_entries
from swarmcore.registry.gossip.members import Member
from swarmcore.registry.gossip.messages import (
    COMPARE,
    EXCHANGE,
    CompareDigests,
    DigestsCompared,
    ExchangeRecords,
    RecordsExchanged,
    records_per_message,
)
from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Accepted
from swarmcore.rpc import Node


@attrs.frozen
class PushPullResult:
    """What a member has said besides its records."""

    ahead: float
    """Seconds by which its clock is ahead of ours."""
    hidden: Sequence[tuple[Key, int]]
    """Keys and sequence numbers of records whose owners it found dead."""


async def push_pull(node: Node, replica: Replica, member: Member, *, timeout: float) -> PushPullResult:
    """Make this replica and ``member``'s equal: memberlist's push-pull, by digests.

    Costs one call when they are equal already, else one more for every 248 records that one side lacks.
    Raises as `Node.call` does; ``timeout`` is for each call.
    """
    store, batch = replica.store, records_per_message(node.limits, replica.store.limits)
    compared = await node.call(member.addresses, COMPARE, CompareDigests(store.hashes()), timeout=timeout)
    ahead = compared.clock - replica.now()
    wanted, offered = store.compare(set(compared.buckets), unpack_entries(compared.entries))
    records = list(store.current(offered))
    while wanted or records:
        request = ExchangeRecords(tuple(records[:batch]), b"".join(wanted[:batch]))
        wanted, records = wanted[batch:], records[batch:]
        reply = await node.call(member.addresses, EXCHANGE, request, timeout=timeout)
        await replica.merge(reply.records)
    return PushPullResult(ahead, list(unpack_entries(compared.hidden)))


def answer_compare(replica: Replica, request: CompareDigests) -> DigestsCompared:
    """Raise `ProtocolError` when the digest is malformed."""
    buckets = replica.store.differing(request.hashes)
    entries = pack_entries(replica.store.entries(buckets))
    hidden = pack_entries(replica.store.hidden_entries())
    return DigestsCompared(tuple(sorted(buckets)), entries, replica.now(), hidden)


async def answer_exchange(
    node: Node, replica: Replica, request: ExchangeRecords
) -> tuple[RecordsExchanged, list[tuple[SignedRecord, Accepted]]]:
    """The reply, and those of the caller's records that were news. Raise `ProtocolError` for bad keys."""
    keys = split_keys(request.wanted)[: records_per_message(node.limits, replica.store.limits)]
    news = await replica.merge(request.records)
    return RecordsExchanged(tuple(replica.store.current(keys))), news
