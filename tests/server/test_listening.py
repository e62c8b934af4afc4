"""Where a peer listens that was not told where."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from swarmcore.cli.listening import network_config
from swarmcore.errors import AddressInUseError
from swarmcore.identity import Identity
from swarmcore.server import run
from swarmcore.server.run import NetworkConfig, listening
from swarmcore.transport import transport_class
from swarmcore.types import PeerId

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
    monkeypatch.setattr(run, "DEFAULT_PORT", candidate)
    monkeypatch.setattr(run, "PORTS_TRIED", 3)
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
