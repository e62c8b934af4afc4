from __future__ import annotations

import random

import pytest

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

from multiaddr import Multiaddr

from swarmcore_transports.libp2p.nat.port_mapping import PortMapper, external_ports


def test_the_same_port_is_wanted_outside_and_then_any_other():
    first, *others = external_ports(4001, random.Random(1))
    assert first == 4001
    assert len(set(others)) == 4
    assert all(1024 < port < 2**16 for port in others)


async def test_no_router_is_looked_for_without_an_ipv4_address_of_a_lan():
    mapper = PortMapper(lambda addresses: pytest.fail(f"mapped {addresses}"), random.Random(1))
    mapper.update_listening([Multiaddr("/ip4/127.0.0.1/tcp/4001"), Multiaddr("/ip4/11.0.0.1/tcp/4001")])
    mapper.update_listening([Multiaddr("/ip6/fd00::1/tcp/4001")])
    assert mapper._task is None
    await mapper.close()
    assert repr(mapper) == "<PortMapper idle>"
