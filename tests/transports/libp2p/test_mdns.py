"""Finding peers by multicast DNS: what is told, what is believed, and real multicast on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from multiaddr import Multiaddr
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from swarmcore.client.swarm import connect
from swarmcore.errors import InputError, UnavailableError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.lan import meet_neighbours
from swarmcore.rpc.node import Node
from swarmcore.types import Address, PeerId, ServerInfo
from swarmcore_transports.libp2p import Libp2pTransport, mdns
from swarmcore_transports.libp2p.mdns import MAX_ADDRESSES, SERVICE, Mdns, decode, encode

OWN, OTHER, THIRD = (Identity.from_seed(bytes([n]) * 32).peer for n in (1, 2, 3))
LAN = Multiaddr("/ip4/192.168.0.7/tcp/4001")
LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/4001")
PATIENCE = 10.0


def txt(*strings: str) -> bytes:
    return b"".join(bytes([len(s.encode())]) + s.encode() for s in strings)


def test_a_record_has_each_address_with_the_peer_and_no_relayed_ones() -> None:
    relayed = Multiaddr(f"/ip4/192.0.2.1/tcp/1/p2p/{THIRD}/p2p-circuit")
    text = encode([LAN, relayed, LOOPBACK], OTHER)
    assert text == txt(
        f"dnsaddr=/ip4/192.168.0.7/tcp/4001/p2p/{OTHER}", f"dnsaddr=/ip4/127.0.0.1/tcp/4001/p2p/{OTHER}"
    )
    assert [str(address) for address in decode(text, OWN)] == [
        f"libp2p:/ip4/192.168.0.7/tcp/4001/p2p/{OTHER}",
        f"libp2p:/ip4/127.0.0.1/tcp/4001/p2p/{OTHER}",
    ]
    assert decode(text, OTHER) == ()  # oneself


def test_what_cannot_be_dialled_is_left_out() -> None:
    good = f"/ip4/192.168.0.7/tcp/4001/p2p/{OTHER}"
    text = txt(
        "other=thing",
        "dnsaddr=",
        "dnsaddr=nonsense",
        "dnsaddr=/ip4/192.168.0.7/tcp/4001",
        f"dnsaddr=/ip4/192.168.0.7/udp/4001/quic-v1/p2p/{OTHER}",
        "dnsaddr=/ip4/192.168.0.7/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        f"dnsaddr={good}",
        f"dnsaddr=/ip4/192.168.0.8/tcp/4001/p2p/{THIRD}",  # one record, one peer
    )
    assert [str(address) for address in decode(text, OWN)] == [f"libp2p:{good}"]


def test_addresses_of_one_peer_are_bounded() -> None:
    many = [f"/ip4/192.168.0.7/tcp/{port}" for port in range(4001, 4101)]
    assert len(decode(txt(*(f"dnsaddr={m}/p2p/{OTHER}" for m in many)), OWN)) == MAX_ADDRESSES
    assert len(decode(encode(map(Multiaddr, many), OTHER), OWN)) == MAX_ADDRESSES


RECORDS = st.lists(st.text(max_size=60)).map(lambda texts: txt(*(f"dnsaddr={text}" for text in texts)))


@given(st.one_of(st.binary(max_size=300), RECORDS))
def test_no_record_is_too_strange_to_read(text: bytes) -> None:
    decode(text, OWN)


# --- over multicast -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def multicast() -> None:
    """Skips where loopback carries no multicast."""
    group, near = "239.255.77.5", "127.0.0.1"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
    ):
        there.bind(("", 0))
        there.settimeout(1.0)
        try:
            joined = struct.pack("4s4s", socket.inet_aton(group), socket.inet_aton(near))
            there.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)
            here.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(near))
            here.sendto(b"x", (group, there.getsockname()[1]))
            there.recv(1)
        except OSError as error:
            pytest.skip(f"loopback carries no multicast here: {error}")


class Found:
    """What one `Mdns` has found, waited for by the test. Other programs on this machine may be there, too."""

    def __init__(self) -> None:
        self.addresses: dict[PeerId, list[str]] = {}
        self._more = asyncio.Event()

    def __call__(self, addresses: tuple[Address, ...]) -> None:
        self.addresses[addresses[0].peer] = [address.location for address in addresses]
        self._more.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                self._more.clear()
                await self._more.wait()


@pytest.fixture
async def stack(multicast: None) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def started(stack: AsyncExitStack, peer: PeerId, *own: Multiaddr) -> tuple[Mdns, Found]:
    found = Found()
    one = Mdns(peer, found)
    stack.push_async_callback(one.close)
    await one.start(own)
    return one, found


async def test_two_find_each_other_and_follow_changes(stack: AsyncExitStack) -> None:
    _, mine = await started(stack, OWN, LOOPBACK)
    other, theirs = await started(stack, OTHER, LOOPBACK)
    await mine.until(lambda: OTHER in mine.addresses)
    await theirs.until(lambda: OWN in theirs.addresses)
    other.announce([Multiaddr("/ip4/127.0.0.1/tcp/5001")])
    await mine.until(lambda: mine.addresses[OTHER] == ["/ip4/127.0.0.1/tcp/5001/p2p"])
    assert OWN not in mine.addresses
    assert "told of · " in repr(other)


async def test_who_has_no_address_only_looks(stack: AsyncExitStack) -> None:
    listener, theirs = await started(stack, OTHER, LOOPBACK)
    client, mine = await started(stack, OWN)
    await mine.until(lambda: OTHER in mine.addresses)
    assert "not told of" in repr(client)
    assert OWN not in theirs.addresses
    await listener.close()
    await listener.close()


async def test_peers_remembered_are_bounded(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "MAX_PEERS", 2)
    crowd = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    stack.push_async_callback(crowd.async_close)
    for number in range(5):
        peer = Identity.from_seed(bytes([100 + number]) * 32).peer
        text = txt(f"dnsaddr={LOOPBACK}/p2p/{peer}")
        info = AsyncServiceInfo(SERVICE, f"a{number}.{SERVICE}", port=1, properties=text, server="a.local.")
        await crowd.async_register_service(info, cooperating_responders=True)
    _, mine = await started(stack, OWN, LOOPBACK)
    _, last = await started(stack, OTHER, LOOPBACK)
    await last.until(lambda: len(last.addresses) >= 2)
    await mine.until(lambda: len(mine.addresses) >= 2)
    assert len(mine.addresses) == len(last.addresses) == 2


async def test_where_multicast_is_forbidden_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(**options: object) -> AsyncZeroconf:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(mdns, "AsyncZeroconf", forbidden)
    with pytest.raises(UnavailableError, match="not permitted; give --bootstrap instead"):
        await Mdns(OWN, Found()).start([LOOPBACK])


async def test_members_and_clients_meet_through_their_transports(multicast: None) -> None:
    async with AsyncExitStack() as stack:
        registries = []
        for _ in range(2):
            identity = Identity.generate()
            transport = Libp2pTransport(identity, listen_on=["/ip4/127.0.0.1/tcp/0"], upnp=False)
            node = await stack.enter_async_context(Node(identity, [transport]))
            registry = GossipRegistry(node)
            stack.push_async_callback(registry.close)
            await meet_neighbours(node, registry, patience=0.0)
            await registry.start()
            await registry.announce(ServerInfo(node.peer, tuple(map(str, node.addresses))), 60.0)
            registries.append(registry)
        with pytest.raises(InputError, match="already"):
            await node.find_neighbours(lambda addresses: None)
        both = {registry.node.peer for registry in registries}
        async with asyncio.timeout(PATIENCE):
            for registry in registries:
                changes = registry.changes()
                while not both <= set(registry.view().servers):
                    await anext(changes)
        swarm = await stack.enter_async_context(connect(mdns=True))
        assert both <= set(swarm.view().servers)
