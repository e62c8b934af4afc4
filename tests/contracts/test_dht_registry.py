"""The registry over the DHT of libp2p: its contract, the end of half of its nodes, and lies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from swarmcore.client.swarm import connect
from swarmcore.errors import InputError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig
from swarmcore.registry.gossip.records import RecordIssuer, RecordLimits
from swarmcore.registry.gossip.store import Drop
from swarmcore.rpc import Node
from swarmcore.serving import run_bootstrap
from swarmcore.testing.registry_contract import Member, RegistryContract, RegistrySwarm
from swarmcore.types import Address, ModelInfo, ServerInfo, Span

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.multiaddrs import to_multiaddr
from swarmcore_transports.libp2p_dht.lookups import DhtOptions
from swarmcore_transports.libp2p_dht.node import DhtNode
from swarmcore_transports.libp2p_dht.records import ValueRules, encode_value, record_key
from swarmcore_transports.libp2p_dht.registry import DhtRegistry

QUICK = DhtOptions(refresh=2.0, reread=10.0, upkeep=4.0)


class DhtSwarm(RegistrySwarm):
    ttl, patience = 2.0, 30.0  # in real time
    many = 8  # each with a thread and a libp2p host of its own

    def __init__(self, options: DhtOptions = QUICK) -> None:
        self.options = options
        self.members: list[Member] = []
        self.bootstrap: tuple[str, ...] = ()
        """What the first member joins through."""

    async def join(self, identity: Identity | None = None) -> Member:
        return await self._start(identity or Identity.generate(), ["127.0.0.1:0"])

    async def watch(self, wall_clock: Callable[[], float] = time.time) -> Member:
        """A new client, which does not listen."""
        return await self._start(Identity.generate(), [], wall_clock)

    async def _start(
        self, identity: Identity, listen_on: list[str], wall_clock: Callable[[], float] = time.time
    ) -> Member:
        known = (member.addresses for member in reversed(self.members) if member.addresses)
        bootstrap = next(known, self.bootstrap)
        transport = Libp2pTransport(identity, listen_on=listen_on)
        node = Node(identity, [transport])
        await node.start()
        registry = DhtRegistry(
            node,
            transport,
            list(map(Address.parse, bootstrap)),
            options=self.options,
            wall_clock=wall_clock,
        )
        member = Member(identity, registry, tuple(map(str, node.addresses)))
        self.members.append(member)
        await registry.start()
        return member

    async def crash(self, member: Member) -> None:
        assert isinstance(member.registry, DhtRegistry)
        self.members.remove(member)
        await member.registry.close()
        await member.registry.node.close()

    async def aclose(self) -> None:
        await asyncio.gather(*(self.crash(member) for member in list(self.members)))


class TestDhtRegistry(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(DhtSwarm()) as swarm:
            yield swarm


MODEL = ModelInfo("tiny", "f" * 16, 16, 64)


def serving(member: Member, start: int, **fields: Any) -> ServerInfo:
    return member.info(model=MODEL, span=Span(start, start + 4), **fields)


@pytest.mark.parametrize(("off", "told"), [(3600.0, "1 hour ahead of"), (-7200.0, "2 hours behind")])
async def test_a_client_whose_clock_is_wrong_is_told(
    off: float, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with aclosing(DhtSwarm()) as swarm:
        member = await swarm.join()
        await member.registry.announce(serving(member, 0), 60.0)
        client = await swarm.watch(wall_clock=lambda: time.time() + off)
        assert not client.registry.view().servers
        assert f"clock, which is about {told} that of" in caplog.text


async def test_a_swarm_goes_on_when_half_of_its_nodes_vanish() -> None:
    async with aclosing(DhtSwarm()) as swarm:
        members = [await swarm.join() for _ in range(8)]
        lasting, doomed = members[::2], members[1::2]
        for member in lasting:
            await member.registry.announce(serving(member, 4 * (member.identity.peer[-1] < "a")), 6.0)
        for member in doomed:
            await member.registry.announce(serving(member, 8), 6.0)
        observer = lasting[0]
        await swarm.until(observer, lambda view: len(view.serving(MODEL.fingerprint)) == 8)
        await asyncio.gather(*(swarm.crash(member) for member in doomed))
        await swarm.until(observer, lambda view: set(view.servers) == {m.identity.peer for m in lasting})
        client = await swarm.watch()
        await swarm.until(client, lambda view: set(view.servers) == {m.identity.peer for m in lasting})
        moved = serving(lasting[-1], 12)
        await lasting[-1].registry.announce(moved, 6.0)
        await swarm.until(client, lambda view: view.servers.get(moved.peer) == moved)


async def test_a_suspect_that_does_not_answer_leaves_the_view_and_one_that_does_stays() -> None:
    async with aclosing(DhtSwarm()) as swarm:
        one, other = await swarm.join(), await swarm.join()
        await one.registry.announce(one.info(), 3000.0)
        await other.registry.announce(other.info(), 3000.0)
        client = await swarm.watch()
        await swarm.until_known(client, one.info(), other.info())
        await swarm.crash(one)
        for member in (one, other):
            client.registry.suspect(member.identity.peer)
        await swarm.until_known(client, other.info())


async def test_a_client_is_no_node_and_announces_nothing() -> None:
    async with aclosing(DhtSwarm()) as swarm:
        one = await swarm.join()
        client = await swarm.watch()
        with pytest.raises(InputError, match="does not listen"):
            await client.registry.announce(client.info(), swarm.ttl)
        await one.registry.announce(one.info(), swarm.ttl)
        await swarm.until_known(client, one.info())
        assert "0 nodes" in repr(one.registry)


async def test_a_bootstrap_peer_that_is_gone_is_named() -> None:
    async with aclosing(DhtSwarm()) as swarm:
        one = await swarm.join()
        await swarm.crash(one)
        swarm.bootstrap = one.addresses
        with pytest.raises(PeerUnreachableError, match="no bootstrap peer serves the DHT"):
            await swarm.join()


async def test_forged_and_stale_records_are_not_stored_and_counted() -> None:
    async with aclosing(DhtSwarm()) as swarm:
        victim, client = await swarm.join(), await swarm.watch()
        assert isinstance(victim.registry, DhtRegistry)
        await victim.registry.announce(victim.info(sessions=1), 60.0)
        mallory = Libp2pTransport(Identity.generate())
        thread, host = await mallory.trio_side()
        dht = DhtNode(host, ValueRules(RecordLimits()), QUICK, serving=False, on_record=lambda record: None)
        address = Address.parse(victim.addresses[0])
        await thread.call(dht.join, [(address.peer, [to_multiaddr(address)])], timeout=10.0, what="joining")
        own, key = victim.identity, record_key(victim.identity.peer)
        yesterday = RecordIssuer(own, lambda: time.time() - 86400).announce(victim.info(), 60.0)
        former = RecordIssuer(own, lambda: time.time() - 10).announce(victim.info(), 60.0)
        sound = encode_value(RecordIssuer(own, lambda: time.time() + 1).announce(victim.info(), 60.0))
        lies = [encode_value(yesterday), encode_value(former), sound[:-1] + b"!", sound + bytes(2**17)]
        for lie in lies:
            stored = await thread.call(
                dht.lookups.put_value, key, lie, lambda held: True, timeout=10.0, what="lying"
            )
            assert stored == 0
        await mallory.close()
        assert victim.registry.dropped.keys() == {Drop.EXPIRED, Drop.REPLAYED, Drop.FORGED, Drop.OVERSIZED}
        await swarm.until_known(client, victim.info(sessions=1))


async def test_a_bootstrap_peer_and_a_client_of_the_dht() -> None:
    online: asyncio.Future[ServerInfo] = asyncio.get_running_loop().create_future()
    network = NetworkConfig(transports={"libp2p": ["127.0.0.1:0"]}, registry="dht")
    running = asyncio.create_task(
        run_bootstrap(network, Identity.generate(), public_name="meeting point", on_online=online.set_result)
    )
    try:
        async with asyncio.timeout(DhtSwarm.patience):
            info = await online
            async with connect(*info.addresses, registry="dht") as client:
                assert dict(client.view().servers) == {info.peer: info}
    finally:
        running.cancel()
        await asyncio.wait([running])
