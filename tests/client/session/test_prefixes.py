"""Sessions that begin with what servers have computed before: the same results, and what happens when it is
gone, or was never there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from memory_swarm import Reference, Server, Swarm, swarm_of

from swarmcore.client.session.prefix import SessionPrefix
from swarmcore.client.session.session import InferenceSession
from swarmcore.engine.engine import Engine
from swarmcore.errors import InvalidStepError
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.server import inference
from swarmcore.testing.executor import COUNTING_MODEL, Rows, hidden_states, read_rows
from swarmcore.types import PeerId, Span
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.messages import SessionOpened

pytestmark = pytest.mark.virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
PROMPT = [7 * n % 101 for n in range(150)]
OTHER = [*PROMPT[:70], *range(200, 270)]
PARTS = (COUNTING_MODEL.fingerprint, "", "", "raw", "")
MODES = pytest.mark.parametrize("journal", ["client", "servers"])


def embed(tokens: Sequence[int]) -> Rows:
    """Values that survive float32 unchanged."""
    return [[(token * (n + 3) % 4096) / 4096 for n in range(4)] for token in tokens]


@attrs.define(eq=False)
class Text:
    """A session over sequences of tokens, and what the whole model makes of them."""

    session: InferenceSession
    tokens: list[list[int]]
    results: list[Rows] = attrs.field(factory=list)

    @classmethod
    async def begin(cls, swarm: Swarm, *prompts: Sequence[int], **options: Any) -> Text:
        return cls(await swarm.open(len(prompts), prompts, **options), [list(each) for each in prompts])

    async def prompt(self) -> None:
        rows = [row for each in self.tokens for row in embed(each)]
        output = await self.session.step(hidden_states(rows), list(map(len, self.tokens)))
        assert read_rows(output) == await expected(*self.tokens)

    async def say(self, *tokens: int) -> None:
        """A token more of each sequence."""
        for sequence, token in zip(self.tokens, tokens, strict=True):
            sequence.append(token)
        output = await self.session.step(hidden_states(embed(tokens)), [1] * len(tokens))
        assert read_rows(output) == await expected(*self.tokens)

    async def end(self) -> None:
        await self.session.name_pages(self.tokens)
        await self.session.close()


async def expected(*tokens: Sequence[int]) -> Rows:
    return await Reference(len(tokens)).step([embed(each) for each in tokens])


async def computed(swarm: Swarm, *prompts: Sequence[int]) -> None:
    """Sessions with these prompts have come and gone."""
    for prompt in prompts:
        text = await Text.begin(swarm, prompt)
        await text.prompt()
        await text.end()
    await over(swarm)


async def over(swarm: Swarm) -> None:
    """Wait until servers have noticed that all sessions are gone; what is reserved is what they keep."""
    for server in swarm.servers:
        while not server.dead and (server.service.sessions or server.engine.cache_tokens_used):
            await asyncio.sleep(0.01)
        if not server.dead:
            assert server.executor.reserved_tokens == 4 * server.engine.prefixes.pages


def rows_computed(swarm: Swarm) -> list[int]:
    return [server.engine.stats.tokens for server in swarm.servers]


async def test_a_second_session_computes_what_is_new() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        await computed(swarm, PROMPT)
        before = rows_computed(swarm)
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (128,) and text.session.positions == (150,)
        assert [now - then for now, then in zip(rows_computed(swarm), before, strict=True)] == [22] * 3
        for token in (5, 6, 7):
            await text.say(token)
        await text.end()
        await over(swarm)


async def test_what_was_generated_is_found_again() -> None:
    async with swarm_of("0:6", "6:12") as swarm:
        text = await Text.begin(swarm, PROMPT[:100])
        await text.prompt()
        for token in PROMPT[100:135]:
            await text.say(token)
        await text.end()
        again = await Text.begin(swarm, PROMPT)
        await again.prompt()
        assert again.session.cached == (128,)
        await again.end()


async def test_the_last_token_of_a_prompt_is_computed() -> None:
    async with swarm_of("0:12") as swarm:
        await computed(swarm, PROMPT[:128])
        text = await Text.begin(swarm, PROMPT[:128])
        await text.prompt()
        assert text.session.cached == (127,)
        await text.end()


async def test_each_sequence_begins_with_what_it_has_in_common() -> None:
    async with swarm_of("0:6", "6:12") as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, OTHER, [1, 2, 3])
        await text.prompt()
        assert text.session.cached == (128, 64, 0)
        await text.say(1, 2, 3)
        await text.end()


async def test_a_chain_skips_what_all_of_its_stages_have() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        await computed(swarm, PROMPT[:80])
        one = swarm.servers[1]
        for sequence in one.engine.prefixes.leave(None):
            one.executor.release(sequence)
        one.engine.prefixes.enabled = True
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (0,)
        await text.end()
        await over(swarm)
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (128,), "the others have named theirs again"
        await text.end()


async def test_another_client_finds_nothing_of_it() -> None:
    async with swarm_of("0:12") as swarm:
        await computed(swarm, PROMPT)
        swarm.client = await swarm.another_client()
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (0,)
        await text.end()


async def test_a_server_that_shares_prefixes_shares_them() -> None:
    async with swarm_of() as swarm:
        server = await swarm.add("0:12", share_prefixes=True)
        await computed(swarm, PROMPT)
        swarm.client = await swarm.another_client()
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (128,)
        assert server.engine.counters["prefix_hits"] == 1
        await text.end()


async def test_what_was_computed_with_a_clients_own_adapter_is_never_shared() -> None:
    async with swarm_of() as swarm:
        for share in (False, True):
            scope = (await swarm.add("0:12", share_prefixes=share)).service._prefix_scope
            own, served = AdapterName(version="1" * 32), AdapterName("poet")
            clients = PeerId("one"), PeerId("other")
            scopes = [[scope(peer, each, Span(0, 3)) for peer in clients] for each in (own, served, None)]
            assert [one == other for one, other in scopes] == [False, share, share]
            assert len({one for one, _ in scopes}) == 3


@MODES
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("moment", range(5))
async def test_a_server_dies_at_every_moment(journal: str, stage: int, moment: int) -> None:
    async with swarm_of(*TWICE) as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, journal=journal)
        for step in range(5):
            if step == moment:
                await swarm.serving(text.session, stage).kill()
            await (text.say(step) if step else text.prompt())
        assert text.session.failovers == 1
        assert text.session.cached == (128,)
        await text.end()
        await over(swarm)


@MODES
async def test_one_server_after_the_other_dies(journal: str) -> None:
    async with swarm_of(*TWICE, *TWICE) as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, OTHER, journal=journal)
        await text.prompt()
        for stage in (2, 1, 0, 2, 1):
            await swarm.serving(text.session, stage).kill()
            if len([s for s in swarm.servers if not s.dead]) < 9:
                await swarm.add(TWICE[stage])
            await text.say(stage, stage + 1)
        await text.end()
        await over(swarm)


async def test_beams_rollbacks_and_a_death() -> None:
    async with swarm_of(*TWICE) as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, PROMPT)
        await text.prompt()
        reference = Reference(2)
        await reference.step([embed(PROMPT), embed(PROMPT)])
        for tokens, sources, starts in (
            ([3, 4], (1, 0), None),
            ([5, 6], (1, 1), None),
            ([7, 8], (), (90, 40)),
        ):
            rows = [embed([token]) for token in tokens]
            result = await text.session.step(
                hidden_states([*rows[0], *rows[1]]), [1, 1], sources=sources, starts=starts
            )
            assert read_rows(result) == await reference.step(rows, sources=sources, starts=starts)
            await swarm.serving(text.session, 1).kill()
            await swarm.add("4:8")
        await text.session.close()
        await over(swarm)


@MODES
@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_server_has_lost_what_it_said_it_had(
    journal: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, journal=journal)
        server = swarm.serving(text.session, stage)
        [session] = server.engine._sessions.sessions.values()
        session.lengths = session.scheduled = [0]
        await text.prompt()
        assert text.session.failovers == 1 and text.session.cached == (0,)
        await text.say(1)
        assert not swarm.health.banned(10**6)
        await text.end()


async def test_absurd_claims_are_cut_to_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm_of("0:12") as swarm:
        original = Engine.open

        async def boast(*args: Any, **options: Any) -> tuple[int, ...]:
            await original(*args, **options)
            return (10**12,)

        monkeypatch.setattr(Engine, "open", boast)
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.failovers == 1 and text.session.cached == (0,)
        await text.end()


async def test_a_step_that_is_wrong_in_itself_is_refused_with_a_prefix_too() -> None:
    async with swarm_of("0:12") as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT)
        rows = embed(PROMPT)
        rows[-1] = [float("nan")] * 4
        with pytest.raises(InvalidStepError, match="finite"):
            await text.session.step(hidden_states(rows), [len(rows)])
        await text.prompt()
        await text.say(1)
        await text.end()


async def test_a_chain_of_replicas_that_has_the_prefix_is_preferred() -> None:
    async with swarm_of(*TWICE, seed=3) as swarm:
        await computed(swarm, PROMPT)
        chains = set()
        for _ in range(6):
            text = await Text.begin(swarm, PROMPT)
            await text.prompt()
            assert text.session.cached == (128,)
            chains.add(text.session.chain.peers)
            await text.end()
        assert len(chains) == 1


async def test_a_chain_that_has_lost_a_server_is_not() -> None:
    async with swarm_of(*TWICE) as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT)
        victim = swarm.serving(text.session, 1)
        await text.end()
        await victim.kill()
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (0,)
        assert len(swarm.planner.prefixes) == 2
        await text.end()


async def test_other_steps_than_the_prompt_first() -> None:
    async with swarm_of("0:12") as swarm:
        await computed(swarm, PROMPT)
        session = await swarm.open(1, [PROMPT])
        result = await session.step(hidden_states(embed(PROMPT)), [150], reply="all")
        assert len(read_rows(result)) == 150 and session.cached == (0,)
        await session.close()
        session = await swarm.open(2, [PROMPT, OTHER])
        rows = [*embed(PROMPT), *embed(OTHER)]
        for lengths, sources in (([150, 0], ()), ([149, 140], ()), ([150, 140], (0, 0))):
            with pytest.raises(InvalidStepError, match="opened for prompts"):
                await session.step(hidden_states(rows[: sum(lengths)]), lengths, sources=sources)
        result = await session.step(hidden_states(rows), [150, 140])
        assert read_rows(result) == await expected(PROMPT, OTHER) and session.cached == (128, 64)
        await session.close()
        await over(swarm)


@MODES
async def test_a_server_that_leaves_hands_over_what_was_shared_too(journal: str) -> None:
    async with swarm_of(*TWICE, delay=0.01) as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, journal=journal)
        await text.prompt()
        leaving = swarm.serving(text.session, 1)
        await leaving.registry.withdraw()
        drained = asyncio.create_task(leaving.service.drain(30))
        for token in range(5):
            await text.say(token)
        assert await drained == 0
        assert [failover.how for failover in swarm.failovers] == ["handed over"]
        taker = swarm.serving(text.session, 1)
        assert taker.engine.counters["tokens"] < 10, "nothing was computed again"
        for stage in (2, 1):
            await swarm.serving(text.session, stage).kill()
            await swarm.add(TWICE[stage])
            await text.say(9)
        await text.end()
        await over(swarm)
        assert taker.dead or taker.engine.prefixes.pages > 0


@MODES
async def test_a_session_moves_to_a_better_chain(journal: str) -> None:
    async with swarm_of("0:4", "4:12", router=LeastLatency(random.Random(1))) as swarm:
        for server in swarm.servers:
            await announce(server, 10)
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, journal=journal)
        await text.prompt()
        fast = await swarm.add("4:12")
        await announce(fast, 100)
        for token in range(40):
            await text.say(token)
            await asyncio.sleep(4)
        assert text.session.chain.peers == (swarm.servers[0].peer, fast.peer)
        await swarm.serving(text.session, 1).kill()
        await text.say(1)
        await text.end()
        await over(swarm)


async def announce(server: Server, tokens_per_second: float) -> None:
    """Say that a token takes so long there."""
    info = attrs.evolve(server.info(), decode_rps=tokens_per_second, forward_rps=100 * tokens_per_second)
    await server.registry.announce(info, 3600)


@pytest.mark.parametrize(("faster", "again"), [(1.05, True), (1.5, False)])
async def test_a_prefix_is_weighed_against_a_faster_chain(faster: float, again: bool) -> None:
    async with swarm_of("0:12", router=LeastLatency(random.Random(1))) as swarm:
        await announce(swarm.servers[0], 10)
        await computed(swarm, PROMPT)
        await announce(await swarm.add("0:12"), 10 * faster)
        best = swarm.planner.plan(swarm.planner._model.span)
        assert best.peers == (swarm.servers[1].peer,)
        prefix = SessionPrefix([PROMPT], *PARTS)
        chain = swarm.planner.begun(best, prefix, tokens=160, blocked=())
        assert (chain.peers == (swarm.servers[0].peer,)) is again


async def test_without_a_journal_or_without_the_cache() -> None:
    async with swarm_of("0:6", "6:12") as swarm:
        await computed(swarm, PROMPT)
        text = await Text.begin(swarm, PROMPT, journal="off")
        await text.prompt()
        assert text.session.cached == (128,)
        await text.say(1)
        await text.end()
        text = await Text.begin(swarm, PROMPT, prefix_cache=False)
        await text.prompt()
        assert text.session.cached == (0,)
        await text.end()


async def test_servers_of_earlier_versions_have_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm_of("0:6", "6:12") as swarm:
        await computed(swarm, PROMPT)
        monkeypatch.setattr(inference, "SessionOpened", lambda free, *_: SessionOpened(free))
        text = await Text.begin(swarm, PROMPT)
        await text.prompt()
        assert text.session.cached == (0,)
        await text.end()


async def test_a_step_that_was_given_up_names_nothing() -> None:
    async with swarm_of("0:12") as swarm:
        text = await Text.begin(swarm, PROMPT[:70], PROMPT[70:140])
        await text.prompt()
        [server] = swarm.servers
        server.executor.gate = asyncio.Event()
        step = asyncio.create_task(text.session.step(hidden_states(embed([1, 2])), [1, 1], sources=(1, 0)))
        await asyncio.sleep(0.1)
        step.cancel()
        await asyncio.wait([step])
        server.executor.gate.set()
        await text.session.name_pages([PROMPT[:70] + [3] * 60, PROMPT[70:140] + [3] * 60])
        await text.session.close()
        await over(swarm)
        for prompt in (PROMPT[:70], PROMPT[70:140]):
            again = await Text.begin(swarm, [*prompt, *[3] * 60])
            await again.prompt()
            await again.end()
