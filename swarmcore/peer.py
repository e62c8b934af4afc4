"""One peer of a swarm: a node that listens, and the registry that it joins through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs

from swarmcore.errors import AddressInUseError, InputError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.registry.allow_file import AllowFile
from swarmcore.registry.base import Registry
from swarmcore.registry.choice import RegistryChoice, make_registry
from swarmcore.registry.lan import PATIENCE, meet_neighbours
from swarmcore.rpc.node import Node
from swarmcore.tasks import running
from swarmcore.transport import transport_class
from swarmcore.types import Address, PeerId

logger = logging.getLogger(__name__)

DEFAULT_PORT = 7927
"""Where servers listen that were not told where: SWCR on a telephone's keys."""
PORTS_TRIED = 16
"""Ports from that one on that are tried before any free one is taken; each transport has its own."""
PORT = "{port}"

NETWORK_PATIENCE = 120.0
"""Seconds for which a server that has no address but loopback tries to join peers elsewhere."""
NETWORK_PAUSE = 5.0
"""Seconds after which it tries again although no address has come up."""


@attrs.frozen(kw_only=True)
class NetworkConfig:
    """Where a server listens and whom it joins."""

    transports: Mapping[str, Sequence[str]]
    """Transport schemes, each with the places to listen on in that transport's notation; ``{port}`` in them
    is `DEFAULT_PORT`, or the next one that is free."""
    announce: Sequence[str] = ()
    """Addresses to announce instead of those found, for a host behind a forwarded port."""
    bootstrap: Sequence[str] = ()
    """Addresses of members of the swarm; none for the first one."""
    allowed_peers: Collection[PeerId] | None = None
    """The only peers that may call this one; None for everyone."""
    allow_file: AllowFile | None = None
    """Where they stand instead, to be read again when it changes."""
    options: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """Keyword arguments for the constructors of transports, by scheme."""
    registry: RegistryChoice = "gossip"
    """How its members know of each other: a back end, or its name. All of a swarm have to agree."""
    find_neighbours: bool = False
    """Whether to look for the swarm's members on the local network, and to be found there; see
    `Transport.find_neighbours`. A server that knows no ``bootstrap`` joins through those it finds."""


@asynccontextmanager
async def listening(identity: Identity, network: NetworkConfig) -> AsyncIterator[tuple[Node, Registry]]:
    """A listening node, and its registry, which is yet to be started; both are closed at the end."""
    if not network.transports:
        raise InputError("a server needs at least one transport")
    node, registry = await _start_listening(identity, network)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(node.close)
        stack.push_async_callback(registry.close)
        if network.allow_file is not None:
            await stack.enter_async_context(
                running(network.allow_file.follow(node, registry), "list of peers")
            )
        if network.find_neighbours:
            await meet_neighbours(node, registry, patience=0.0 if network.bootstrap else PATIENCE)
        yield node, registry


async def join(node: Node, registry: Registry, network: NetworkConfig) -> None:
    """Start the registry; where there is no network yet, as on a machine that just started, wait for it."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + NETWORK_PATIENCE
    elsewhere = not all(Address.parse(url).on_loopback for url in network.bootstrap)
    while True:
        known = node.addresses
        try:
            return await registry.start()
        except PeerUnreachableError as exc:
            off = all(address.on_loopback for address in known)
            if not elsewhere or not off or loop.time() >= give_up:
                raise
            logger.warning("this machine has no network yet; joining once it has: %s", exc.message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NETWORK_PAUSE):
                await node.addresses_other_than(known)


async def _start_listening(identity: Identity, network: NetworkConfig) -> tuple[Node, Registry]:
    """A node that listens where ``network`` says, on the first of the ports by default that is free."""
    bootstrap = [Address.parse(url) for url in network.bootstrap]
    some_port = any(PORT in place for places in network.transports.values() for place in places)
    for port in (*range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED), 0):
        transports = []
        for number, (scheme, places) in enumerate(network.transports.items()):
            own_port = str(port + number if port else 0)
            transports.append(
                transport_class(scheme)(
                    identity,
                    listen_on=[place.replace(PORT, own_port) for place in places],
                    announce=[url for url in network.announce if url.startswith(f"{scheme}:")],
                    **network.options.get(scheme, {}),
                )
            )
        allowed = network.allow_file.peers if network.allow_file is not None else network.allowed_peers
        node = Node(identity, transports, allowed_peers=allowed)
        registry = make_registry(network.registry, node, bootstrap, member=True)
        try:
            await node.start()
        except AddressInUseError:
            await registry.close()
            if not (some_port and port):
                raise
        except BaseException:
            await registry.close()
            raise
        else:
            return node, registry
    raise AssertionError("port 0 is any free one")
