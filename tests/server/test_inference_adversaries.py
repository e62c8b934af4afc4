"""Clients and joining peers that lie to a server: refused with a reason, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import secrets
from typing import Any

import attrs
import pytest
from memory_swarm import Run, Server, Swarm, quiet, swarm_of

from swarmcore.errors import InvalidStepError, ProtocolError, SwarmError
from swarmcore.resources import Resource
from swarmcore.rpc.channel import Channel
from swarmcore.server.session import ServerSession
from swarmcore.session.journal import MAX_UNSETTLED
from swarmcore.testing.executor import COUNTING_MODEL, hidden_states
from swarmcore.wire.messages import (
    CachePart,
    Hop,
    JoinSession,
    KvTransferFailed,
    KvTransferred,
    OpenSession,
    Recall,
    Replay,
    SessionOpened,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
    TransferKv,
)
from swarmcore.wire.protocols import INFERENCE_PROTOCOL

pytestmark = pytest.mark.virtual_time

ROW = [[0.5] * 4]


async def opened(swarm: Swarm, server: Server) -> tuple[Channel, Hop]:
    span = server.executor.span
    session = secrets.token_hex(16)
    channel = await swarm.client.open(
        server.node.addresses,
        INFERENCE_PROTOCOL,
        OpenSession(session, COUNTING_MODEL.fingerprint, span.start, span.end, 1),
    )
    assert isinstance((await channel.receive()).record, SessionOpened)
    return channel, Hop(server.peer, server.info().addresses, session, span.start, span.end)


async def joined(swarm: Swarm, hop: Hop, server: Server) -> Channel:
    return await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, JoinSession(hop.session))


async def told(channel: Channel) -> Any:
    async with asyncio.timeout(100):
        return (await channel.receive()).record


NOWHERE = Hop("nobody", ("memory://nowhere/nobody",), "0" * 32, 12, 13)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "order",
    [
        Replay(5, (0,), (9,), ()),
        Replay(5, (0,), (9,), (NOWHERE,)),
        Replay(5, (0,), (10**15,), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (-3,), (2,), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (0,), (-2,), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (0, 0), (1, 1), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (), (), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (0,), (1,), (attrs.evolve(NOWHERE, start=4, end=8),)),
        Replay(5, (0,), (1,), (attrs.evolve(NOWHERE, start=4, end=8),), codec="lzma"),
        Step(5, (1,), (1,), sources=(7,)),
        Step(5, (1,), (1,), sources=(-1,)),
        Step(5, (1,), (1,), deadline=float("nan")),
        Step(5, (1,), (1,), reply="some"),
        Step(5, (1,), (1,), chain=(attrs.evolve(NOWHERE, start=0, end=4),)),
        Step(5, (1,), (1,), chain=tuple(attrs.evolve(NOWHERE, start=i, end=i + 1) for i in range(4, 999))),
    ],
)
async def test_what_makes_no_sense_is_refused_and_the_session_goes_on(order: Replay | Step) -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, _ = await opened(swarm, server)
        await channel.send(Step(0, (0,), (1,), journal="servers"), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)
        await channel.send(order, *[hidden_states(ROW)] * isinstance(order, Step))
        answer = await told(channel)
        if not (isinstance(order, Step) and order.reply == "some"):  # which is taken for "last"
            assert isinstance(answer, StepFailed)
            assert answer.step == 5
        await channel.send(Step(6, (1,), (1,), settled=10**18), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)
        await channel.close()
        await quiet(swarm)


@pytest.mark.parametrize("ends", ["aborts", "closes", "fails"])
async def test_nothing_holds_what_a_session_has_sent_once_it_is_over(ends: str) -> None:
    """Not even until garbage is looked for, which may be long after a burst of sessions."""
    gc.collect()
    sizes = {len(kept(ServerSession))}
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        gc.disable()
        try:
            for _ in range(4):
                channel, _ = await opened(swarm, server)
                await channel.send(Step(0, (0,), (1,), journal="servers"), hidden_states(ROW))
                assert isinstance(await told(channel), StepOutput)
                if ends == "fails":
                    await channel.send(Step(1, (7,), (1,)), hidden_states(ROW))
                    assert isinstance(await told(channel), StepFailed)
                await channel.send(Step(2, (1,), (2,)), hidden_states(ROW * 2))
                if ends == "aborts":
                    channel.abort("enough")
                else:
                    await channel.close()
                await quiet(swarm)
                sizes.add(len(kept(ServerSession)))
        finally:
            gc.enable()
    assert sizes == {0}


def kept(kind: type) -> list[Any]:
    return [each for each in gc.get_objects() if type(each) is kind]


@pytest.mark.virtual_time
async def test_of_caches_handed_to_a_session_that_is_not_there_the_client_hears() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, own = await opened(swarm, server)
        await channel.send(TransferKv(attrs.evolve(own, session="0" * 32)))
        failed = await told(channel)
        assert isinstance(failed, KvTransferFailed)
        assert failed.failure.error == "SessionLostError"
        await channel.close()
        await quiet(swarm)


@pytest.mark.parametrize(
    "hop",
    [
        attrs.evolve(NOWHERE, addresses=()),
        attrs.evolve(NOWHERE, addresses=("tcp:",)),
        attrs.evolve(NOWHERE, addresses=("carrier-pigeon://here/nobody",)),
        None,
    ],
)
async def test_caches_are_not_handed_to_nobody_or_to_oneself(hop: Hop | None) -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, own = await opened(swarm, server)
        await channel.send(Step(0, (0,), (1,)), hidden_states(ROW))
        await told(channel)
        await channel.send(TransferKv(hop or own))
        assert isinstance(await told(channel), KvTransferFailed)
        await channel.send(Step(1, (1,), (1,)), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)
        await channel.close()
        await quiet(swarm)


@pytest.mark.parametrize(
    "part",
    [
        CachePart(0, 0, 10**15),
        CachePart(0, 0, -1),
        CachePart(0, 10**15, 1),
        CachePart(0, -1, 1),
        CachePart(10**15, 0, 1),
        CachePart(-1, 0, 1),
        CachePart(0, 0, 200),
        CachePart(0, 0, 1000),
    ],
)
async def test_parts_of_caches_that_make_no_sense_are_refused(part: CachePart) -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        pushed = await joined(swarm, hop, server)
        await pushed.send(part, hidden_states(ROW))
        assert isinstance(await told(channel), KvTransferFailed)
        await pushed.send(CachePart(0, 0, 0, last=True))
        assert await told(channel) == KvTransferred((0,))
        await channel.close()
        await quiet(swarm)


@pytest.mark.parametrize("record", [Replay(0, (0,), (1,), ()), TransferKv(NOWHERE), Recall(0, 1)])
async def test_who_has_only_joined_a_session_does_not_command_it(record: Any) -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        pushed = await joined(swarm, hop, server)
        await pushed.send(record)
        with pytest.raises(InvalidStepError, match="only the client"):
            await told(pushed)
        await channel.send(Step(0, (0,), (1,)), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)


@pytest.mark.parametrize("overtaken", range(5))
async def test_a_recall_may_come_at_any_place_among_the_steps_of_the_stage_before(overtaken: int) -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        pushed = await joined(swarm, hop, server)
        await pushed.send(Step(0, (0,), (1,)), hidden_states(ROW))
        assert (await told(channel)).step == 0
        server.executor.gate = asyncio.Event()
        steps = [Step(1, (1,), (1,)), Step(2, (2,), (2,)), Step(3, (4,), (1,)), Step(4, (2,), (1,))]
        for number in range(5):
            if number == overtaken:
                await channel.send(Recall(2, 4))
                await asyncio.sleep(0.01)
            for step in steps[number : number + 1]:
                await pushed.send(step, hidden_states(ROW * sum(step.lengths)))
                await asyncio.sleep(0.01)
        server.executor.gate.set()
        assert [(await told(channel)).step for _ in range(2)] == [1, 4], "the others are not answered"
        assert server.engine.length(hop.session) == (3,)
        assert server.engine.counters["tokens"] == 3, "they were not computed"
        assert server.service.counters["rows_recalled"] == 3
        await channel.send(Recall(-(2**62), 2**62))
        await channel.send(Step(2**61, (0,), (1,)), hidden_states(ROW))
        await channel.send(Step(2**62, (0,), (1,)), hidden_states(ROW))
        assert (await told(channel)).step == 2**62, "whoever calls all back gets nothing"
        await channel.close()
        await quiet(swarm)


async def test_what_reorders_its_sequences_is_computed_though_it_is_called_back() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, _ = await opened(swarm, server)
        server.executor.gate = asyncio.Event()
        for step in (Step(0, (0,), (1,)), Step(1, (1,), (1,)), Step(2, (1,), (1,), sources=(0,))):
            await channel.send(step, hidden_states(ROW))
        await asyncio.sleep(0.01)
        await channel.send(Recall(1, 2))
        await asyncio.sleep(0.01)
        server.executor.gate.set()
        assert [(await told(channel)).step for _ in range(2)] == [0, 2]
        await channel.close()


async def test_steps_without_their_tensor_take_no_place_in_the_session() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        for _ in range(10):
            pushed = await joined(swarm, hop, server)
            await pushed.send(Step(0, (0,), (1,)))
            with pytest.raises(ProtocolError, match="lacks its tensor"):
                await told(pushed)
        await channel.send(Step(0, (0,), (1,)), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)


async def test_a_session_that_is_closed_lets_go_of_who_has_joined_it() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        pushed = [await joined(swarm, hop, server) for _ in range(3)]
        await channel.close()
        for each in pushed:
            with pytest.raises(SwarmError):
                await told(each)
        assert server.node.resources.used(Resource.STREAMS) == 0


async def test_two_may_wait_for_a_session_that_is_about_to_open() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        span, session = server.executor.span, secrets.token_hex(16)
        hop = Hop(server.peer, server.info().addresses, session, span.start, span.end)
        first = await joined(swarm, hop, server)
        await asyncio.sleep(6)
        second = await joined(swarm, hop, server)
        with pytest.raises(SwarmError, match="never opened"):
            await told(first)
        channel = await swarm.client.open(
            server.node.addresses,
            INFERENCE_PROTOCOL,
            OpenSession(session, COUNTING_MODEL.fingerprint, span.start, span.end, 1),
        )
        await told(channel)
        await second.send(Step(0, (0,), (1,)), hidden_states(ROW))
        assert isinstance(await told(channel), StepOutput)
        assert not server.service._awaited


async def test_a_client_that_never_reads_is_not_waited_for_by_others() -> None:
    async with swarm_of("0:4", "0:4") as swarm:
        server = swarm.servers[0]
        channel, _ = await opened(swarm, server)

        async def spam() -> None:
            for number in range(5000):
                await channel.send(Step(number, (0,), (8,)), hidden_states(ROW * 8))

        spamming = asyncio.create_task(spam())
        other, _ = await opened(swarm, server)
        for number in range(20):
            await other.send(Step(number, (number,), (1,)), hidden_states(ROW))
            assert isinstance(await told(other), StepOutput)
        assert server.engine._sessions.pending.tokens <= 8 * 5
        spamming.cancel()
        await asyncio.gather(spamming, return_exceptions=True)
        channel.abort("enough")
        await other.close()
        await quiet(swarm)


async def test_what_a_server_keeps_for_a_replay_is_bounded_whatever_the_client_says_is_settled() -> None:
    async with swarm_of("0:4") as swarm:
        [server] = swarm.servers
        channel, hop = await opened(swarm, server)
        for number in range(100):  # over and over again, and none of it ever comes home
            await channel.send(Step(number, (0,), (2,), journal="servers"), hidden_states(ROW * 2))
            await told(channel)
        kept = server.service._sessions[hop.session]._replay_cache._outputs
        assert len(kept._unsettled) <= MAX_UNSETTLED
        assert kept._history.nbytes <= 2 * 4 * 4
        await channel.close()
        await quiet(swarm)


async def test_a_stale_stage_that_wakes_up_does_no_harm() -> None:
    """What it still pushes, were it let in, neither computes nor answers nor breaks anything."""
    async with swarm_of("0:4", "4:8", "8:12", "4:8", "8:12", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        stale, after = swarm.serving(session, 1), swarm.serving(session, 2)
        hop = session._pipeline.stages[2].opened.hop
        pushed = await joined(swarm, hop, after)
        step = asyncio.create_task(run.step(1))
        await asyncio.sleep(0.015)
        await stale.kill()
        await step
        hosted = after.service._sessions[hop.session]
        hosted.upstream.allow_only([swarm.serving(session, 1).peer, swarm.client.peer])
        computed = after.engine.counters["steps"]
        for step in (Step(0, (0,), (3,)), Step(1, (3,), (1,), chain=(NOWHERE,)), Step(0, (0,), (1,))):
            await pushed.send(step, hidden_states(ROW * sum(step.lengths)))
        await asyncio.sleep(1)
        assert after.engine.counters["steps"] == computed
        assert after.service.counters["steps_outdated"] == 3
        assert hosted._downstream._channel is None
        for _ in range(3):
            await run.step(1)
        assert len(swarm.failovers) == 1
        await session.close()
        await quiet(swarm)


# --- what goes where -------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["client", "servers", "off"])
async def test_copies_are_beside_the_way_of_a_token(journal: str, monkeypatch) -> None:
    """A token is N + 1 messages; N - 1 copies, or notes, are sent after what they are copies of."""
    sent: list[tuple[str, str, int]] = []
    send = Channel.send

    async def noted(self: Channel, record: Any, *tensors: Any) -> None:
        sent.append((type(record).__name__, self.remote, sum(t.data.nbytes for t in tensors)))
        await send(self, record, *tensors)

    async with swarm_of("0:3", "3:6", "6:9", "9:12", delay=0.01) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(3)
        await asyncio.sleep(1)
        monkeypatch.setattr(Channel, "send", noted)
        loop = asyncio.get_running_loop()
        start = loop.time()
        await run.step(1)
        assert loop.time() - start == pytest.approx(0.05), "five delays"
        await asyncio.sleep(1)
        monkeypatch.undo()
        kinds = [kind for kind, _, _ in sent]
        assert kinds.count("Step") == 4
        assert kinds.count("StepOutput") == 1
        assert kinds.count("StepForwarded") == (0 if journal == "off" else 3)
        copies = [index for index, kind in enumerate(kinds) if kind == "StepForwarded"]
        forwards = [index for index, kind in enumerate(kinds) if kind == "Step"]
        assert all(copy > forward for copy, forward in zip(copies, forwards[1:], strict=False))
        to_client = sum(nbytes for _, remote, nbytes in sent if remote == swarm.client.peer)
        assert to_client == 16 * (4 if journal == "client" else 1)
        await session.close()


async def test_a_client_that_does_not_take_its_copies_slows_nobody_until_the_bound(monkeypatch) -> None:
    monkeypatch.setattr("swarmcore.server.client_outbox.MAX_COPIES_NBYTES", 10 * 16)
    async with swarm_of("0:6", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(1)
        [hosted] = swarm.serving(session, 0).service._sessions.values()
        link, held = hosted._client, asyncio.Event()
        send = link._channel.send

        async def slow(record: Any, *tensors: Any) -> None:
            if isinstance(record, StepForwarded):
                await held.wait()
            await send(record, *tensors)

        monkeypatch.setattr(link._channel, "send", slow)
        loop = asyncio.get_running_loop()
        start = loop.time()
        for _ in range(11):
            await run.step(1)
        assert loop.time() == start

        async def go_on() -> None:
            for _ in range(5):
                await run.step(1)

        going = asyncio.create_task(go_on())
        await asyncio.wait([going], timeout=1)
        assert not going.done()
        assert 10 * 16 <= link._copies_nbytes <= 12 * 16
        held.set()
        await going
        await run.step(1)
        await session.close()
        await quiet(swarm)
