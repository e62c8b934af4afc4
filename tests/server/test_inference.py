"""Sessions over several servers: the real server and client code on an in-memory network."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from counting_servers import (
    rows,
    serving,
    session_over,
    until,
    whole_model,
)

from swarmcore.identity import Identity
from swarmcore.routing.chain import Stage
from swarmcore.rpc.memory_stream import MemoryStream
from swarmcore.rpc.node import Node
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import PeerId, Span


@pytest.mark.parametrize("blocks", [("0:12",), ("0:5", "5:6", "6:12")])
async def test_a_session_computes_what_the_whole_model_does(network, client, blocks):
    first, second = rows(9), rows(6, seed=4)
    expected = await whole_model(first, second)
    async with (
        serving(network, *blocks) as servers,
        await session_over(client, servers, sequences=2) as session,
    ):
        output = await session.step(hidden_states(first[:7] + second[:4]), [7, 4], reply="all")
        assert read_rows(output) == expected[0][:7] + expected[1][:4]
        output = await session.step(hidden_states([first[7], second[4]]), [1, 1])
        assert read_rows(output) == [expected[0][7], expected[1][4]]
        output = await session.step(hidden_states([second[5]]), [0, 1])
        assert read_rows(output) == [expected[1][5]]
        assert session.positions == (8, 6)


async def test_a_chain_may_use_a_part_of_what_a_server_holds(network, client):
    given = rows(5)
    [expected] = await whole_model(given)
    async with serving(network, "0:8", "4:12") as servers:
        stages = [servers[0].stage, Stage(servers[1].stage.server, Span(8, 12))]
        async with await session_over(client, [], stages=stages) as session:
            assert read_rows(await session.step(hidden_states(given), [5], reply="all")) == expected


@pytest.mark.parametrize("reply", ["all", "last"])
async def test_long_prompts_are_cut_into_chunks_that_overlap(network, client, reply):
    first, second = rows(20), rows(9, seed=5)
    expected = await whole_model(first, second)
    async with (
        serving(network, "0:6", "6:12") as servers,
        await session_over(client, servers, sequences=2, chunk_rows=4) as session,
    ):
        output = await session.step(hidden_states(first + second), [20, 9], reply=reply)
        if reply == "all":
            assert read_rows(output) == expected[0] + expected[1]
        else:
            assert read_rows(output) == [expected[0][-1], expected[1][-1]]
        assert sum(map(sum, servers[0].executor.batches)) == 29
        assert servers[0].engine.counters["steps"] == 8


async def test_rollback_goes_through_the_whole_chain(network, client):
    given = rows(8)
    [expected] = await whole_model(given)
    async with (
        serving(network, "0:6", "6:12") as servers,
        await session_over(client, servers) as session,
    ):
        await session.step(hidden_states(given[:4] + rows(3, seed=9)), [7])
        session.rollback([4])
        output = await session.step(hidden_states(given[4:]), [4], reply="all")
        assert read_rows(output) == expected[4:]


async def test_a_token_over_n_servers_costs_n_plus_one_messages(network, client, monkeypatch):
    sent: Counter[tuple[PeerId, PeerId]] = Counter()
    send = MemoryStream.send

    async def counted(self: MemoryStream, *buffers) -> None:
        sent[self._end.peer, self.remote] += 1
        await send(self, *buffers)

    async with (
        serving(network, "0:4", "4:8", "8:12") as servers,
        await session_over(client, servers) as session,
    ):
        await session.step(hidden_states(rows(3)), [3])
        monkeypatch.setattr(MemoryStream, "send", counted)
        for _ in range(5):
            await session.step(hidden_states(rows(1)), [1])
    peers = [client.peer, *(server.node.peer for server in servers)]
    assert sent == dict.fromkeys(zip(peers, [*peers[1:], client.peer], strict=True), 5)


async def test_the_client_carries_a_hop_that_a_server_cannot_make(network, client):
    given = rows(6)
    [expected] = await whole_model(given)
    other = MemoryNetwork()
    async with serving(network, "0:4", "8:12") as (first, last), serving(other, "4:8") as [island]:
        # Only the client has a transport to the network that the middle server is on.
        bridge = Identity.generate()
        both = [network.transport(bridge, listen=False), on_island(other.transport(bridge, listen=False))]
        async with Node(bridge, both) as node:
            middle = island.stage
            addresses = tuple(url.replace("memory:", "island:") for url in middle.server.addresses)
            middle = Stage(attrs.evolve(middle.server, addresses=addresses), middle.span)
            stages = [first.stage, middle, last.stage]
            async with await session_over(node, [], stages=stages) as session:
                output = await session.step(hidden_states(given[:5]), [5], reply="all")
                assert read_rows(output) == expected[:5]
                output = await session.step(hidden_states(given[5:]), [1])
                assert read_rows(output) == expected[5:]
        assert first.service.counters["steps_pushed"] == 0
        assert island.service.counters["steps_pushed"] == 0


def on_island(transport):
    transport.scheme = "island"
    return transport


async def test_a_hop_that_breaks_in_the_middle_is_carried(network, client):
    given = rows(6)
    [expected] = await whole_model(given)
    async with (
        serving(network, "0:6", "6:12") as (first, last),
        await session_over(client, [first, last]) as session,
    ):
        await session.step(hidden_states(given[:3]), [3])
        # The first server forgets its way to the second and cannot find it again.
        [hosted] = first.service._sessions.values()
        hosted._downstream._channel.abort("cable cut")
        first.node.allowed_peers = frozenset([client.peer])
        await until(lambda: hosted._downstream._watching.done())
        output = await session.step(hidden_states(given[3:5]), [2], reply="all")
        assert read_rows(output) == expected[3:5]
        output = await session.step(hidden_states(given[5:]), [1])
        assert read_rows(output) == expected[5:]
        assert first.service.counters["steps_pushed"] == 1


async def test_the_log_tells_of_sessions(network, client, caplog):
    caplog.set_level("INFO", "swarmcore.server")
    async with serving(network, "0:12") as servers:
        async with await session_over(client, servers) as session:
            await session.step(hidden_states(rows(2)), [2])
        await until(lambda: any(line.endswith(" ended") for line in caplog.messages))
    told = [line for line in caplog.messages if "session" in line and "BlockServer" not in line]
    assert [line.split(" of ")[0][:8] for line in told] == ["session "] * 2
    assert told[0].endswith(" opened on blocks 0:12")
    assert told[1].endswith(" ended")
