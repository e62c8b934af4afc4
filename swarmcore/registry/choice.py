"""Which back end of the registry a peer runs: one that is installed, by name, or one that is passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swarmcore.errors import InputError
from swarmcore.plugins import PluginGroup
from swarmcore.registry.base import Registry
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.rpc.node import Node
from swarmcore.types import Address

REGISTRIES = PluginGroup("registry", "swarmcore.registries", extras={"dht": "libp2p"})
"""The installed back ends; each entry point is a `RegistryFactory`."""


class RegistryFactory(Protocol):
    """Makes the registry of one peer: what a back end is installed as."""

    def __call__(self, node: Node, bootstrap: Sequence[Address], *, member: bool) -> Registry:
        """The registry of ``node``, yet to be started, which will join through ``bootstrap``.

        ``node`` is neither started nor closed by it, and has the transports that the registry may use. A
        ``member`` listens, announces itself and may be joined through; another one is a client, which reads.
        Raise `InputError` when these transports or addresses will not do.
        """


RegistryChoice = str | RegistryFactory
"""The name of a back end that is installed, or one itself. All peers of a swarm have to agree: members of
one do not see those of another."""


def make_registry(
    choice: RegistryChoice, node: Node, bootstrap: Sequence[Address], *, member: bool
) -> Registry:
    """The registry of ``node``, yet to be started.

    Raise `InputError` when no such back end is installed, or it cannot work over the node's transports, and
    `MissingExtraError` when it needs a library that is not there.
    """
    factory = REGISTRIES.load(choice) if isinstance(choice, str) else choice
    registry = factory(node, bootstrap, member=member) if callable(factory) else factory
    if not isinstance(registry, Registry):
        raise InputError(f"registry {choice!r} does not make a Registry, but {type(registry).__name__}")
    return registry


def gossip(node: Node, bootstrap: Sequence[Address], *, member: bool) -> Registry:
    """The registry that is built in: members gossip, clients follow one of them."""
    return GossipRegistry(node, bootstrap) if member else WatchingRegistry(node, bootstrap)
