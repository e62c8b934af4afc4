"""By which addresses a peer is announced on machines of every kind, and which nobody can dial."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

import attrs
import pytest

from swarmcore.errors import AddressError
from swarmcore.identity import Identity
from swarmcore.transport import Transport, transport_class
from swarmcore.types import Address
from swarmcore_transports import local_addresses
from swarmcore_transports.local_addresses import MAX_ADDRESSES, available, reachable_places, undialable

SCHEMES = ["tcp", "libp2p", "webrtc"]

HOPELESS = [
    "0.0.0.0:4001",
    "[::]:4001",
    "[::ffff:0.0.0.0]:4001",
    "0.1.2.3:4001",
    "224.0.0.251:4001",
    "239.1.2.3:4001",
    "[ff02::1]:4001",
    "[::ffff:224.0.0.1]:4001",
    "255.255.255.255:4001",
    "192.0.2.7:0",
    "[2001:db8::7]:0",
    "example.org:0",
    "[fe80::1]:4001",
]
FINE = ["192.0.2.7:4001", "[2001:db8::7]:4001", "example.org:4001", "10.0.0.2:1", "127.0.0.1:65535"]


@attrs.frozen
class Ip:
    ip: str | tuple[str, int, int]
    network_prefix: int = 24


@attrs.frozen
class Adapter:
    ips: list[Ip]


class Machine:
    """The addresses that this machine seems to have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ips: str) -> None:
        self.has(*ips)
        monkeypatch.setattr(local_addresses.ifaddr, "get_adapters", lambda: [Adapter(self.ips)])
        monkeypatch.setattr(local_addresses, "_default_route", lambda version: None)
        monkeypatch.setattr(local_addresses, "_POLL_SECONDS", 0.01)

    def has(self, *ips: str) -> None:
        self.ips = [Ip((ip, 0, 0) if ":" in ip else ip) for ip in ("127.0.0.1", "::1", *ips)]


WILD = [("0.0.0.0", 4001), ("::", 4001)]


@pytest.mark.parametrize(
    ("ips", "places"),
    [
        ([], ["127.0.0.1", "::1"]),
        (["192.0.2.7"], ["192.0.2.7"]),
        (["2001:db8::7"], ["2001:db8::7"]),
        (["192.0.2.7", "2001:db8::7", "fe80::7", "169.254.3.4"], ["192.0.2.7", "2001:db8::7"]),
        (["fe80::7", "169.254.3.4"], ["127.0.0.1", "::1"]),
    ],
)
def test_wildcards_are_spelt_out(ips: list[str], places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, *ips)
    assert [host for host, _ in reachable_places(WILD)] == places


def test_loopback_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, "192.0.2.7")
    assert reachable_places([("127.0.0.1", 1), ("0.0.0.0", 2)]) == [("127.0.0.1", 1), ("192.0.2.7", 2)]


def test_no_more_are_announced_than_fit_into_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, *(f"10.0.{net}.1" for net in range(40)))
    assert len(reachable_places(WILD)) == MAX_ADDRESSES


def test_a_family_that_is_not_there_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_addresses, "_has_family", lambda wildcard: wildcard == "::")
    assert available(["0.0.0.0", "::"], str) == ["::"]
    assert available(["0.0.0.0"], str) == ["0.0.0.0"], "asked for alone, it fails by name"
    assert available(["127.0.0.1", "0.0.0.0", "::"], str) == ["127.0.0.1", "::"]


@pytest.mark.parametrize("place", HOPELESS)
def test_what_nobody_can_dial_has_a_reason(place: str) -> None:
    host, _, port = place.rpartition(":")
    assert undialable(host.strip("[]"), int(port))


def test_a_link_local_address_with_its_zone_can_be_dialled() -> None:
    assert not undialable("fe80::1%eth0", 4001)


def transport_of(scheme: str, listen: Iterable[str], announce: Iterable[str] = ()) -> Transport:
    options = {"upnp": False} if scheme == "libp2p" else {}
    cls = transport_class(scheme)
    return cls(Identity.generate(), listen_on=tuple(listen), announce=tuple(announce), **options)


def default_places(scheme: str) -> list[str]:
    return [place.format(port=0) for place in transport_class(scheme).default_places]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("place", HOPELESS)
async def test_what_nobody_can_dial_is_not_announced(scheme: str, place: str) -> None:
    peer = Identity.generate().peer
    with pytest.raises(AddressError):
        transport_class(scheme).address_at(place, peer)
    with pytest.raises(AddressError):
        transport = transport_of(scheme, ["127.0.0.1:0"], [place])
        try:
            await transport.listen(lambda stream: stream.close())
        finally:
            await transport.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("place", FINE)
def test_what_somebody_may_dial_is(scheme: str, place: str) -> None:
    peer = Identity.generate().peer
    address = transport_class(scheme).address_at(place, peer)
    assert address.peer == peer and str(place.rpartition(":")[2]) in str(address)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_addresses_follow_the_network(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    transport = transport_of(scheme, default_places(scheme))
    told: asyncio.Queue[tuple[Address, ...]] = asyncio.Queue()
    transport.on_addresses = told.put_nowait
    try:
        first = await transport.listen(lambda stream: stream.close())
        assert first and all("127.0.0.1" in str(each) or "::1" in str(each) for each in first)
        assert any("from this machine only" in note for note in transport.notes())
        for ips in (["192.0.2.7"], ["192.0.2.8"], ["192.0.2.8", "2001:db8::7"], ["2001:db8::7"]):
            machine.has(*ips)
            async with asyncio.timeout(20):
                while sorted(_host(each) for each in await told.get()) != sorted(ips):
                    pass
            assert not any("from this machine only" in note for note in transport.notes())
    finally:
        await transport.close()


async def test_a_network_that_is_gone_for_a_moment_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, "192.0.2.7")
    transport = transport_of("tcp", ["0.0.0.0:0"])
    told: asyncio.Queue[tuple[Address, ...]] = asyncio.Queue()
    transport.on_addresses = told.put_nowait
    try:
        await transport.listen(lambda stream: stream.close())
        machine.has()
        await asyncio.sleep(0.1)
        machine.has("192.0.2.9")
        assert [_host(each) for each in await told.get()] == ["192.0.2.9"]
        assert told.empty()
    finally:
        await transport.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_who_listens_on_loopback_is_told_who_can_join(scheme: str) -> None:
    transport = transport_of(scheme, ["127.0.0.1:0"])
    try:
        await transport.listen(lambda stream: stream.close())
        assert any("listens on loopback" in note for note in transport.notes())
    finally:
        await transport.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
async def test_both_families_are_listened_on_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, "2001:db8::7")
    if not local_addresses._has_family("::"):
        pytest.skip("there is no IPv6 here")
    transport = transport_of("tcp", default_places("tcp"))
    try:
        assert [_host(each) for each in await transport.listen(lambda s: s.close())] == ["2001:db8::7"]
    finally:
        await transport.close()


def _host(address: Address) -> str:
    text = address.location
    if "/tcp/" in text:
        return text.split("/")[2]
    return text.rpartition(":")[0].rpartition("/")[2].strip("[]")
