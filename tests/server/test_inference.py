"""Sessions over several servers: the real server and client code on an in-memory network."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import pytest

from swarmcore.client.session import InferenceSession, SessionOptions, open_session
from swarmcore.errors import (
    CacheFullError,
    InvalidStepError,
    ModelMismatchError,
    ServerDrainingError,
    SessionLostError,
    SpanError,
    SwarmError,
    UnavailableError,
)
from swarmcore.executor.base import Segment, SequenceId, Slice
from swarmcore.executor.engine import Engine
from swarmcore.identity import Identity
from swarmcore.routing.chain import Chain, Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.inference import InferenceService
from swarmcore.server.protocols import INFERENCE_PROTOCOL
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, hidden_states, read_rows
from swarmcore.testing.memory import MemoryNetwork, MemoryStream
from swarmcore.types import PeerId, ServerInfo, Span
from swarmcore.wire.messages import JoinSession, OpenSession, SessionOpened, Step, StepFailed, StepOutput

CACHE = 64


@attrs.define
class Server:
    """A server of the tests: its parts, within reach."""

    node: Node
    executor: CountingExecutor
    engine: Engine
    service: InferenceService

    @property
    def stage(self) -> Stage:
        info = ServerInfo(
            peer=self.node.peer,
            addresses=tuple(map(str, self.node.addresses)),
            model=COUNTING_MODEL,
            span=self.executor.span,
        )
        return Stage(info, self.executor.span)


@asynccontextmanager
async def serving(network: MemoryNetwork, *blocks: str) -> AsyncIterator[list[Server]]:
    async with AsyncExitStack() as stack:
        servers = []
        for span in map(Span.parse, blocks):
            identity = Identity.generate()
            node = await stack.enter_async_context(Node(identity, [network.transport(identity)]))
            executor = CountingExecutor(span, tokens=CACHE)
            engine = Engine(executor, cache_tokens=CACHE)
            await engine.start()
            stack.push_async_callback(engine.close)
            service = InferenceService(engine, COUNTING_MODEL, span, node, admission_timeout=0.05)
            node.serve_protocol(INFERENCE_PROTOCOL, service.serve)
            servers.append(Server(node, executor, engine, service))
        yield servers


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
async def client(network: MemoryNetwork) -> AsyncIterator[Node]:
    identity = Identity.generate()
    async with Node(identity, [network.transport(identity, listen=False)]) as node:
        yield node


@attrs.define
class PlannedBy:
    """A planner that asks a function for the chain around the peers to be avoided."""

    chain: Callable[[frozenset[PeerId]], Chain]

    def plan(self, span: Span, *, blocked=frozenset(), **_) -> Chain:
        return self.chain(blocked)

    def compare(self, chain: Chain, **_) -> None:
        return None

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        pass

    def worked(self, peer: PeerId) -> None:
        pass

    def session_id(self) -> str:
        return secrets.token_hex(16)


async def session_over(
    client: Node,
    servers: Sequence[Server],
    *,
    stages: Sequence[Stage] | None = None,
    sequences: int = 1,
    **options,
) -> InferenceSession:
    chain = Chain(tuple(stages or [server.stage for server in servers]))
    return await open_session(
        client,
        PlannedBy(lambda blocked: chain),
        COUNTING_MODEL,
        sequences=sequences,
        options=SessionOptions(open_timeout=5, step_timeout=5, **{"journal": "off", **options}),
    )


def rows(count: int, seed: int = 1) -> list[list[float]]:
    return [
        [(seed + 3 * i + 7 * j) % 11 / 8 for j in range(COUNTING_MODEL.hidden_size)] for i in range(count)
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def whole_model(*sequences: list[list[float]]) -> list[list[list[float]]]:
    """What every row of each sequence comes out as when one executor runs it all at once."""
    executor = CountingExecutor()
    outputs = []
    for number, given in enumerate(sequences):
        sequence = SequenceId(number)
        executor.reserve(sequence, 4 * CACHE)
        [output] = await executor.step(
            [Slice(hidden_states(given), 0, executor.span, (Segment(sequence, 0, len(given)),))]
        )
        outputs.append(read_rows(output))
    return outputs


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
        sent[self._transport.identity.peer, self.remote] += 1
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
        hosted._next._channel.abort("cable cut")
        first.node.allowed_peers = frozenset([client.peer])
        await until(lambda: hosted._next._watch.done())
        output = await session.step(hidden_states(given[3:5]), [2], reply="all")
        assert read_rows(output) == expected[3:5]
        output = await session.step(hidden_states(given[5:]), [1])
        assert read_rows(output) == expected[5:]
        assert first.service.counters["steps_pushed"] == 1


async def open_by_hand(client: Node, server: Server, **changes) -> tuple[Channel, OpenSession]:
    span = server.executor.span
    opening = attrs.evolve(
        OpenSession(secrets.token_hex(16), COUNTING_MODEL.fingerprint, span.start, span.end, 1), **changes
    )
    channel = await client.open(server.node.addresses, INFERENCE_PROTOCOL, opening)
    message = await channel.receive()
    assert isinstance(message.record, SessionOpened)
    return channel, opening


async def test_a_repeated_step_is_answered_and_not_computed(network, client):
    async with serving(network, "0:12") as [server]:
        channel, _ = await open_by_hand(client, server)
        answers = []
        for _ in range(3):
            await channel.send(Step(0, (0,), (4,)), hidden_states(rows(4)))
            message = await channel.receive()
            assert isinstance(message.record, StepOutput)
            answers.append(read_rows(message.tensor("hidden")))
        assert answers[0] == answers[1] == answers[2]
        assert server.engine.counters["steps"] == 1
        assert server.service.counters["steps_repeated"] == 2


@pytest.mark.parametrize(
    ("step", "given", "reason"),
    [
        (Step(1, (9,), (1,)), rows(1), "ahead of its 2 cached"),
        (Step(1, (2, 0), (1, 1)), rows(2), "expected 1 of each"),
        (Step(1, (2,), (-1,)), rows(1), "expected 0 or more"),
        (Step(1, (2,), (2,)), rows(1), "expected \\[2, 4\\]"),
        (Step(1, (2,), (1,)), [[1.0] * 5], "expected \\[1, 4\\]"),
        (Step(1, (2,), (1,)), [[float("nan")] * 4], "not finite"),
        (Step(1, (2,), (1,), codec="lzma"), rows(1), "lzma"),
        (Step(0, (2,), (1,)), rows(1), "other positions"),
    ],
)
async def test_a_wrong_step_is_refused_with_its_reason_and_hurts_nobody(network, client, step, given, reason):
    async with serving(network, "0:12") as [server], await session_over(client, [server]) as other:
        [expected] = await whole_model(rows(4))
        await other.step(hidden_states(rows(2)), [2])
        channel, _ = await open_by_hand(client, server)
        await channel.send(Step(0, (0,), (2,)), hidden_states(rows(2)))
        await channel.receive()
        await channel.send(step, hidden_states(given))
        refused = (await channel.receive()).record
        assert isinstance(refused, StepFailed)
        assert refused.failure.error.endswith("Error")
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(refused.failure.message)
        # Both the session that was refused and the other one go on where they were.
        await channel.send(Step(2, (2,), (2,)), hidden_states(rows(4)[2:]))
        assert read_rows((await channel.receive()).tensor("hidden")) == expected[2:]
        assert read_rows(await other.step(hidden_states(rows(4)[2:]), [2], reply="all")) == expected[2:]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"fingerprint": "0" * 32}, ModelMismatchError),
        ({"end": 13}, SpanError),
        ({"start": 5, "end": 5}, SpanError),
        ({"session": "me"}, InvalidStepError),
        ({"tokens": CACHE + 1}, CacheFullError),
    ],
)
async def test_a_session_that_cannot_be_is_refused(network, client, changes, error):
    async with serving(network, "0:12") as [server]:
        with pytest.raises(error):
            await open_by_hand(client, server, **changes)
        assert server.service.sessions == 0


async def test_admission_waits_and_then_says_how_long_to_wait(network, client):
    async with serving(network, "0:12") as [server]:
        await open_by_hand(client, server, tokens=CACHE)
        with pytest.raises(CacheFullError) as caught:
            await open_by_hand(client, server, tokens=CACHE)
        assert caught.value.retry_after > 0


async def test_a_draining_server_takes_no_new_sessions(network, client):
    async with serving(network, "0:12") as [server], await session_over(client, [server]) as session:
        server.service.draining = True
        with pytest.raises(ServerDrainingError):
            await open_by_hand(client, server)
        await session.step(hidden_states(rows(2)), [2])


async def test_nobody_joins_a_session_that_is_not_there(network, client, monkeypatch):
    monkeypatch.setattr("swarmcore.server.inference.JOIN_TIMEOUT", 0.01)
    async with serving(network, "0:12") as [server]:
        channel = await client.open(server.node.addresses, INFERENCE_PROTOCOL, JoinSession("0" * 32))
        with pytest.raises(SessionLostError):
            await channel.receive()


async def test_a_client_that_vanishes_frees_its_cache_on_every_server(network, client):
    identity = Identity.generate()
    async with serving(network, "0:6", "6:12") as servers:
        async with Node(identity, [network.transport(identity, listen=False)]) as doomed:
            session = await session_over(doomed, servers)
            await session.step(hidden_states(rows(9)), [9])
            assert all(server.engine.cache_tokens_free < CACHE for server in servers)
        with pytest.raises(UnavailableError):
            await session.step(hidden_states(rows(1)), [1])
        await session.close()
        await until(lambda: not any(server.service.sessions for server in servers))
        assert [server.engine.cache_tokens_free for server in servers] == [CACHE, CACHE]


async def test_a_server_that_vanishes_fails_the_step_under_way(network, client):
    async with serving(network, "0:6", "6:12") as servers:
        session = await session_over(client, servers)
        servers[1].executor.gate = asyncio.Event()
        step = asyncio.create_task(session.step(hidden_states(rows(1)), [1]))
        await until(lambda: servers[1].executor.computing)
        await servers[1].node.close()
        with pytest.raises(UnavailableError, match="6:12"):
            await step
        with pytest.raises(UnavailableError):
            await session.step(hidden_states(rows(1)), [1])
        await session.close()
        servers[1].executor.gate.set()


async def test_a_refusal_in_the_middle_leaves_the_session_usable(network, client):
    given = rows(4)
    [expected] = await whole_model(given)
    async with (
        serving(network, "0:6", "6:12") as servers,
        await session_over(client, servers) as session,
    ):
        await session.step(hidden_states(given[:2]), [2])
        servers[1].executor.failures.append(CacheFullError("no room", retry_after=1.0))
        with pytest.raises(CacheFullError) as caught:
            await session.step(hidden_states(given[2:]), [2])
        assert caught.value.retry_after == 1.0
        assert session.positions == (2,)
        output = await session.step(hidden_states(given[2:]), [2], reply="all")
        assert read_rows(output) == expected[2:]


async def test_a_server_that_refuses_is_avoided_at_the_next_attempt(network, client):
    async with serving(network, "0:12", "0:12") as (full, roomy):
        full.service.draining = True

        def plan(avoided) -> Chain:
            return Chain(((roomy if full.node.peer in avoided else full).stage,))

        async with await open_session(client, PlannedBy(plan), COUNTING_MODEL, sequences=1) as session:
            assert session.chain.peers == (roomy.node.peer,)


async def test_cancelling_a_step_leaves_nothing_behind(network, client):
    given = rows(4)
    [expected] = await whole_model(given)
    async with (
        serving(network, "0:6", "6:12") as servers,
        await session_over(client, servers) as session,
    ):
        await session.step(hidden_states(given[:2]), [2])
        servers[0].executor.gate = asyncio.Event()
        step = asyncio.create_task(session.step(hidden_states(rows(2, seed=8)), [2]))
        await until(lambda: servers[0].executor.computing)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        servers[0].executor.gate.set()
        servers[0].executor.gate = None
        output = await session.step(hidden_states(given[2:]), [2], reply="all")
        assert read_rows(output) == expected[2:]


async def test_a_step_that_was_refused_for_its_number_leaves_the_right_one_remembered(network, client):
    async with serving(network, "0:12") as [server]:
        channel, _ = await open_by_hand(client, server)
        right = Step(0, (0,), (2,))
        answers = []
        for step in (right, attrs.evolve(right, lengths=(3,)), right):
            await channel.send(step, hidden_states(rows(sum(step.lengths))))
            answers.append(await channel.receive())
        assert [type(answer.record) for answer in answers] == [StepOutput, StepFailed, StepOutput]
        assert server.engine.counters["steps"] == 1


async def test_a_failed_step_is_computed_when_it_comes_again(network, client):
    async with serving(network, "0:12") as [server]:
        channel, _ = await open_by_hand(client, server)
        server.executor.failures.append(CacheFullError("no room"))
        answers = []
        for _ in range(2):
            await channel.send(Step(0, (0,), (2,)), hidden_states(rows(2)))
            answers.append(await channel.receive())
        assert [type(answer.record) for answer in answers] == [StepFailed, StepOutput]
