"""How many addresses a node has to tell: no more than fit into a record, of each transport its share."""

from __future__ import annotations

from collections import Counter

import pytest

from swarmcore.identity import Identity
from swarmcore.rpc.node import Node
from swarmcore.types import Address
from swarmcore.wire.limits import MAX_ADDRESSES


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"a": 3, "b": 2}, {"a": 3, "b": 2}),
        ({"a": 20}, {"a": 16}),
        ({"a": 12, "b": 12}, {"a": 8, "b": 8}),
        ({"a": 12, "b": 1, "c": 12}, {"a": 8, "b": 1, "c": 7}),
    ],
)
def test_each_transport_has_its_share(there: dict[str, int], told: dict[str, int]) -> None:
    node = Node(Identity.generate(), [])
    for scheme, count in there.items():
        found = [Address(scheme, f"//host{number}:1", node.peer) for number in range(count)]
        node._put_addresses(scheme, found)
    addresses = node.addresses
    assert len(addresses) <= MAX_ADDRESSES and len(set(addresses)) == len(addresses)
    assert Counter(address.scheme for address in addresses) == told
    for scheme, count in told.items():
        mine = [address.location for address in addresses if address.scheme == scheme]
        assert mine == [f"//host{number}:1" for number in range(count)], "the first ones, in their order"
