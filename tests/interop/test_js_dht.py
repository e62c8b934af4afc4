"""The DHT registry and a js-libp2p node: joining through it, and records in both directions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from js_node import JsNode

from swarmcore.identity import Identity
from swarmcore.registry.gossip.records import RecordIssuer
from swarmcore.rpc import Node
from swarmcore.types import Address, ServerInfo

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p_dht.lookups import DhtOptions
from swarmcore_transports.libp2p_dht.records import encode_value, record_key
from swarmcore_transports.libp2p_dht.registry import DhtRegistry

KAD = ("--dht", "--dht-protocol", "/swarmcore/kad/1.0.0")
TIMEOUT = 20.0


@asynccontextmanager
async def member(js: JsNode) -> AsyncIterator[DhtRegistry]:
    """A member of the swarm that joins through ``js`` and knows nobody else."""
    identity = Identity.generate()
    transport = Libp2pTransport(identity, listen_on=["127.0.0.1:0"])
    async with Node(identity, [transport]) as node:
        registry = DhtRegistry(
            node, transport, [Address.parse(f"libp2p:{js.addrs[0]}")], options=DhtOptions(refresh=1.0)
        )
        try:
            await registry.start()
            yield registry
        finally:
            await registry.close()


def info_of(registry: DhtRegistry) -> ServerInfo:
    return ServerInfo(registry.node.peer, tuple(map(str, registry.node.addresses)), public_name="py")


async def test_members_find_each_other_through_a_js_node(js_libp2p: Path) -> None:
    async with JsNode(js_libp2p, *KAD) as js, member(js) as one, member(js) as other:
        changes = other.changes()
        await one.announce(info_of(one), 60.0)
        async with asyncio.timeout(TIMEOUT):
            assert (await anext(changes)).info == info_of(one)


async def test_a_record_put_on_one_side_is_read_on_the_other(js_libp2p: Path) -> None:
    async with JsNode(js_libp2p, *KAD) as js, member(js) as registry:
        await registry.announce(info_of(registry), 60.0)
        key = record_key(registry.node.peer)
        value = await js.get(key.decode())
        assert b"py" in value

        stranger = Identity.generate()
        issuer = RecordIssuer(stranger, time.time)
        info = ServerInfo(stranger.peer, (), public_name="js")
        changes = registry.changes()
        await js.put(record_key(stranger.peer).decode(), encode_value(issuer.announce(info, 60.0)))
        async with asyncio.timeout(TIMEOUT):
            assert (await anext(changes)).info == info
