"""From the options that concern libp2p to the configuration of a peer."""

from __future__ import annotations

from typing import Any

import pytest

from swarmcore.cli.output import Output
from swarmcore.cli.peer import AddressReport, network_config
from swarmcore.client.swarm import connect
from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.transport import transport_class

pytest.importorskip("libp2p", reason="needs the extra libp2p")

PEER = Identity.from_seed(b"p" * 32).peer
RELAY = f"/ip4/192.0.2.7/tcp/4001/p2p/{Identity.from_seed(b'r' * 32).peer}"


def config(**given: Any) -> Any:
    values = {"transports": ["libp2p"], "listen": [], "announce": [], "bootstrap": [], "allowed_peers": []}
    return network_config(PEER, **(values | given))


def test_without_options_everything_is_left_to_the_transport() -> None:
    plain = config()
    assert plain.transports == {"libp2p": ("/ip4/0.0.0.0/tcp/{port}", "/ip6/::/tcp/{port}")}
    assert plain.options == {}
    assert not plain.find_neighbours


def test_every_option_arrives() -> None:
    given = config(relay="off", relay_peers=[RELAY], no_upnp=True, mdns=True)
    assert given.options == {"libp2p": {"relay": "off", "relays": (RELAY,), "upnp": False}}
    assert given.find_neighbours
    transport_class("libp2p")(Identity.generate(), **given.options["libp2p"])  # takes them all


@pytest.mark.parametrize(
    ("text", "multiaddr"),
    [
        ("/ip4/192.0.2.7/tcp/4001", "/ip4/192.0.2.7/tcp/4001"),
        ("libp2p:/ip6/2001:db8::1/tcp/4001", "/ip6/2001:db8::1/tcp/4001"),
        (f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}", "/ip4/192.0.2.7/tcp/4001"),
        ("192.0.2.7:4001", "/ip4/192.0.2.7/tcp/4001"),
        ("example.org:4001", "/dns/example.org/tcp/4001"),
        ("/dns4/example.org/tcp/4001", "/dns4/example.org/tcp/4001"),
    ],
)
def test_announced_places_become_whole_multiaddrs(text: str, multiaddr: str) -> None:
    assert config(announce=[text]).announce == (f"libp2p:{multiaddr}/p2p/{PEER}",)


@pytest.mark.parametrize("text", ["nowhere", "example.org:", "/ip4/192.0.2.7/udp/4001", RELAY])
def test_places_that_cannot_be_announced_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        config(announce=[text])


def test_addresses_that_come_and_go_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    lan, mapped, relayed = (f"libp2p:/ip4/192.0.2.{host}/tcp/4001/p2p/{PEER}" for host in (7, 8, 9))
    report = AddressReport(Output(json_lines=False))
    report.online((lan, mapped))
    report.changed((lan, relayed))
    printed = capsys.readouterr()
    assert printed.out.split() == [lan, mapped]
    assert printed.err.splitlines() == [f"also reached at {relayed}", f"no longer reached at {mapped}"]


def test_the_dht_is_a_registry_of_libp2p_only() -> None:
    assert config().registry == "gossip"
    assert config(registry="dht").registry == "dht"
    with pytest.raises(InputError, match="needs the transport libp2p"):
        connect(f"tcp://192.0.2.7:4001/{PEER}", registry="dht")
