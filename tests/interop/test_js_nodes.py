"""The js-libp2p nodes that other tests talk to, talking to each other."""

from __future__ import annotations

import pytest
from js_node import JsNode, JsNodeError

STREAM = "/swarmcore/stream/1"
MIB = 2**20


async def test_two_js_nodes_ping_each_other_and_echo_messages(js_libp2p):
    async with JsNode(js_libp2p, "--echo") as a, JsNode(js_libp2p) as b:
        await b.ping(a.addrs[0])
        await b.dial(a.addrs[0], STREAM, [0, 1, 70_000, 3 * MIB])
        assert [peer["id"] for peer in await a.peers()] == [b.id]


async def test_a_js_record_put_on_one_node_is_read_on_another(js_libp2p):
    async with JsNode(js_libp2p, "--dht") as a, JsNode(js_libp2p, "--dht") as b:
        await b.connect(a.addrs[0])
        await b.put("/swarmcore/model", (1).to_bytes(8) + b"one")
        assert await a.get("/swarmcore/model") == (1).to_bytes(8) + b"one"


async def test_a_js_node_says_what_went_wrong(js_libp2p):
    async with JsNode(js_libp2p) as node:
        with pytest.raises(JsNodeError, match="ECONNREFUSED"):
            await node.ping("/ip4/127.0.0.1/tcp/1")
        await node.kill()
        with pytest.raises(JsNodeError, match="ended"):
            await node.peers()
