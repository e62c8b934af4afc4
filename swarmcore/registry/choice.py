"""Which back end of the registry a peer runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from swarmcore.errors import InputError
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.transport import Transport
from swarmcore.types import Address

RegistryKind = Literal["gossip", "dht"]
"""All peers of a swarm have to agree: members of the one do not see those of the other."""


@runtime_checkable
class CarriesDht(Protocol):
    """A transport whose peers form a distributed hash table."""

    def dht_registry(self, node: Node, bootstrap: Sequence[Address]) -> Registry:
        """A registry of ``node`` over it, yet to be started. Raise `InputError` for addresses not its own."""


def dht_registry(node: Node, transports: Sequence[Transport], bootstrap: Sequence[Address]) -> Registry:
    """The DHT registry of ``node``, over the one of its ``transports`` that has a DHT.

    Raise `InputError` when none has.
    """
    for transport in transports:
        if isinstance(transport, CarriesDht):
            return transport.dht_registry(node, bootstrap)
    raise InputError("the registry dht needs the transport libp2p: add it, or choose the registry gossip")
