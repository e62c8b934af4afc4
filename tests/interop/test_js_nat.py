"""A js-libp2p node and a peer of ours behind a router leave the relay between them.

With the node on the Internet, whether by DCUtR or because one has learnt the other's address is up to them.
With the node behind another router it takes DCUtR and a port that our router maps: js-libp2p dials from ports
of its own choice, so it punches no hole.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from js_node import JsNode
from lab_peer import LabPeer
from nat_lab import NatLab, nat_lab, unavailable

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no NAT lab: {unavailable()}")

JS_PLACE = "/ip4/11.0.0.1/tcp/4201"


def js_node(lab: NatLab, folder: Path, *flags: str) -> JsNode:
    """One on the Internet."""
    return JsNode(
        folder,
        *("--listen", JS_PLACE, "--announce", JS_PLACE, *(flags or ("--echo", "--dcutr"))),
        within=("ip", "netns", "exec", lab.namespace("public")),
    )


def js_node_at_home(lab: NatLab, folder: Path) -> JsNode:
    return JsNode(
        folder,
        *("--listen", "/ip4/0.0.0.0/tcp/4301", "--dcutr"),
        within=("ip", "netns", "exec", lab.namespace("b")),
    )


async def relay_in(lab: NatLab) -> str:
    relay = await LabPeer(lab, "public", listen_on=["/ip4/0.0.0.0/tcp/4001"]).start()
    [address] = await relay.call("addresses")
    return str(address)


def is_direct(connections: list[str]) -> bool:
    return "DIRECT" in connections


async def test_a_js_node_has_our_peer_dial_it_directly(js_libp2p: Path):
    async with nat_lab() as lab, js_node(lab, js_libp2p) as node:
        at = await relay_in(lab)
        await node.reserve(at.removeprefix("libp2p:"))
        client = await LabPeer(lab, "b").start()
        await client.call("open_stream", f"{at}/p2p-circuit/p2p/{node.id}")
        await client.until("connections", node.id, shows=is_direct)
        stream = await client.call("open_stream", f"libp2p:{JS_PLACE}/p2p/{node.id}")
        await client.call("exchange", stream, [1, 70_000])
        assert await client.call("path", stream) != "relayed"


async def test_our_peer_dials_a_js_node_that_has_come_by_a_relay(js_libp2p: Path):
    async with nat_lab() as lab, js_node(lab, js_libp2p) as node:
        at = await relay_in(lab)
        server = await LabPeer(lab, "a", listen_on=["/ip4/0.0.0.0/tcp/4101"], relays=[at], upnp=False).start()
        addresses = await server.until("addresses", shows=lambda found: "p2p-circuit" in found[-1])
        relayed = addresses[-1].removeprefix("libp2p:")
        await node.ping(relayed)
        await server.until("connections", node.id, shows=is_direct)
        await node.dial(relayed, "/swarmcore/stream/1", [1, 70_000])


@pytest.mark.skipif(unavailable(upnp=True) is not None, reason=f"no UPnP lab: {unavailable(upnp=True)}")
async def test_our_peer_has_a_js_node_behind_another_router_dial_it(js_libp2p: Path):
    async with (
        nat_lab() as lab,
        js_node(lab, js_libp2p, "--relay") as relay,
        js_node_at_home(lab, js_libp2p) as node,
    ):
        await lab.map_ports("a")
        at = f"{JS_PLACE}/p2p/{relay.id}"
        server = await LabPeer(lab, "a", listen_on=["/ip4/0.0.0.0/tcp/4101"], relays=[at]).start()
        addresses = await server.until("addresses", shows=lambda found: len(found) == 3)
        await node.ping(addresses[-1].removeprefix("libp2p:"))
        await server.until("connections", node.id, shows=is_direct)
        ways = [peer["addr"] for peer in await node.peers() if peer["id"] == server.peer]
        assert f"/ip4/11.0.0.2/tcp/4101/p2p/{server.peer}" in ways
