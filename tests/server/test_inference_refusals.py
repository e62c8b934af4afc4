"""Sessions stay in order while steps come again, are refused or cancelled, and clients or servers go."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from counting_servers import (
    CACHE,
    PlannedBy,
    open_by_hand,
    rows,
    serving,
    session_over,
    until,
    whole_model,
)

from swarmcore.client.session.session import open_session
from swarmcore.errors import (
    CacheFullError,
    InvalidStepError,
    ModelMismatchError,
    ServerDrainingError,
    SessionLostError,
    SpanError,
    UnavailableError,
)
from swarmcore.identity import Identity
from swarmcore.routing.chain import Chain
from swarmcore.rpc.node import Node
from swarmcore.testing.executor import COUNTING_MODEL, hidden_states, read_rows
from swarmcore.wire.messages import JoinSession, Step, StepFailed, StepOutput
from swarmcore.wire.protocols import INFERENCE_PROTOCOL


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
