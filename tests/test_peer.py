"""Where a peer listens that was not told where."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from swarmcore import peer as peer_module
from swarmcore.cli.peer import network_config
from swarmcore.errors import AddressInUseError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig, join, listening
from swarmcore.transport import transport_class
from swarmcore.types import Address, PeerId

ANY = NetworkConfig(transports={"tcp": ["127.0.0.1:{port}"]})


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first of three ports that are free, which are all that are tried."""
    for candidate in range(20_000, 30_000, 7):
        with ExitStack() as stack:
            try:
                for port in range(candidate, candidate + 3):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        break
    monkeypatch.setattr(peer_module, "DEFAULT_PORT", candidate)
    monkeypatch.setattr(peer_module, "PORTS_TRIED", 3)
    yield candidate


def port(node: object) -> int:
    (address,) = node.addresses  # type: ignore[attr-defined]
    return int(str(address).split("/")[2].rpartition(":")[2])


async def test_the_first_port_that_is_free(first: int) -> None:
    async with listening(Identity.generate(), ANY) as (one, _):
        assert port(one) == first
        async with (
            listening(Identity.generate(), ANY) as (two, _),
            listening(Identity.generate(), ANY) as (three, _),
        ):
            assert (port(two), port(three)) == (first + 1, first + 2)
            async with listening(Identity.generate(), ANY) as (four, _):
                assert port(four) not in range(first, first + 3)
    async with listening(Identity.generate(), ANY) as (again, _):
        assert port(again) == first


async def test_a_port_that_was_asked_for_is_not_replaced(first: int) -> None:
    with socket.create_server(("127.0.0.1", first)):
        asked = NetworkConfig(transports={"tcp": [f"127.0.0.1:{first}"]})
        with pytest.raises(AddressInUseError):
            async with listening(Identity.generate(), asked):
                pass


@pytest.mark.parametrize("scheme", ["tcp", "libp2p", "webrtc"])
def test_every_transport_has_such_a_place(scheme: str) -> None:
    if scheme != "tcp":
        pytest.importorskip({"webrtc": "aiortc"}.get(scheme, scheme), reason=f"needs the extra {scheme}")
    assert all("{port}" in place for place in transport_class(scheme).default_places)
    told = {"transports": [scheme], "announce": [], "bootstrap": [], "allowed_peers": []}
    peer = PeerId(Identity.generate().peer)
    assert (
        network_config(peer, listen=[], **told).transports[scheme] == transport_class(scheme).default_places
    )


class _Registry:
    """Nobody answers until there is a network."""

    def __init__(self, node: _NoNetworkYet) -> None:
        self.node = node
        self.attempts = 0

    async def start(self) -> None:
        self.attempts += 1
        if all(address.on_loopback for address in self.node.addresses):
            raise PeerUnreachableError("nobody answers")


class _NoNetworkYet:
    def __init__(self) -> None:
        self.addresses = (Address("tcp", "//127.0.0.1:1", PEER),)
        self.changed = asyncio.Event()

    def comes_up(self) -> None:
        self.addresses = (Address("tcp", "//192.0.2.7:1", PEER),)
        self.changed.set()

    async def addresses_other_than(self, known: object) -> None:
        await self.changed.wait()


PEER = Identity.generate().peer
ELSEWHERE = NetworkConfig(transports={}, bootstrap=[f"tcp://192.0.2.1:1/{PEER}"])
HERE = NetworkConfig(transports={}, bootstrap=[f"tcp://127.0.0.1:2/{PEER}"])


@pytest.mark.virtual_time
async def test_a_server_that_starts_before_the_network_joins_when_it_is_up() -> None:
    node = _NoNetworkYet()
    registry = _Registry(node)
    joining = asyncio.create_task(join(node, registry, ELSEWHERE))  # type: ignore[arg-type]
    await asyncio.sleep(12)
    assert not joining.done() and registry.attempts == 3
    node.comes_up()
    await joining
    assert registry.attempts == 4


@pytest.mark.virtual_time
@pytest.mark.parametrize(("network", "seconds"), [(ELSEWHERE, 120), (HERE, 0)])
async def test_a_server_whose_network_never_comes_up_or_is_not_needed_says_so(
    network: NetworkConfig, seconds: float
) -> None:
    node, loop = _NoNetworkYet(), asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(PeerUnreachableError):
        await join(node, _Registry(node), network)  # type: ignore[arg-type]
    assert seconds <= loop.time() - began <= seconds + 5


@pytest.mark.parametrize(
    ("location", "local"),
    [
        ("//127.0.0.1:1", True),
        ("//[::1]:1", True),
        ("//localhost:1", True),
        ("wss://127.0.0.1:1", True),
        ("/ip4/127.0.0.1/tcp/1/p2p", True),
        ("/ip6/::1/tcp/1/p2p", True),
        ("//192.0.2.7:1", False),
        ("//[2001:db8::1]:1", False),
        ("//localhost.example.org:1", False),
        ("/ip4/10.0.127.1/tcp/1/p2p", False),
        ("wss://example.org:1", False),
    ],
)
def test_which_addresses_lead_nowhere_else(location: str, local: bool) -> None:
    assert Address("x", location, PEER).on_loopback == local
