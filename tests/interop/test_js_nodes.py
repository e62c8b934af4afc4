"""The js-libp2p nodes that other tests talk to, talking to each other."""

from __future__ import annotations

import pytest
from interop.js_node import JsNode, JsNodeError, install

STREAM = "/swarmcore/stream/1"
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return install(tmp_path_factory.getbasetemp().parent)


async def test_two_js_nodes_ping_each_other_and_echo_frames(folder):
    async with JsNode(folder, "--echo") as a, JsNode(folder) as b:
        assert 0 <= await b.ping(a.addrs[0]) < 10
        await b.dial(a.addrs[0], STREAM, [0, 1, 70_000, 3 * MIB])
        assert [peer["id"] for peer in await a.peers()] == [b.id]


async def test_a_js_record_put_on_one_node_is_read_on_another(folder):
    async with JsNode(folder, "--dht") as a, JsNode(folder, "--dht") as b:
        await b.connect(a.addrs[0])
        await b.put("/swarmcore/model", (1).to_bytes(8) + b"one")
        assert await a.get("/swarmcore/model") == (1).to_bytes(8) + b"one"


async def test_a_js_node_says_what_went_wrong(folder):
    async with JsNode(folder) as node:
        with pytest.raises(JsNodeError, match="ECONNREFUSED"):
            await node.ping("/ip4/127.0.0.1/tcp/1")
        await node.kill()
        with pytest.raises(JsNodeError, match="ended"):
            await node.peers()
