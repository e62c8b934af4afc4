"""Servers are killed, or leave, while drafted chunks are under way: the text is that of plain decoding.

`SPECULATION_SEEDS=0:100` tries more texts and moments.
"""

from __future__ import annotations

import os
import random
from collections import deque
from typing import Any

import pytest
from scripted_drafters import ScriptedSource

import swarmcore
from swarmcore.client.speculation.speculator import Speculator
from swarmcore.session.steps import SentStep
from swarmcore.testing.fleet import Member

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = ["Once-upon-a-time", "A-good-guest-knows-when-to-leave."]
TOKENS, TROUBLES = 64, 5
VOCABULARY = 94
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3},
]
SETTINGS = [
    swarmcore.Speculation(length=3, depth=4),
    swarmcore.Speculation(length=2, depth=8),
    swarmcore.Speculation(max_tokens=4),
]
FIRST, LAST = map(int, os.environ.get("SPECULATION_SEEDS", "0:2").split(":"))


class Trouble:
    """Befalls servers of a session right behind chunks that it has sent."""

    def __init__(self, client: Any, session: swarmcore.ModelSession, chance: random.Random) -> None:
        self._client, self._session, self._chance = client, session, chance
        self._send = session.send_embedded
        session.send_embedded = self.send_embedded  # type: ignore[method-assign]
        self._due = sorted(chance.sample(range(2, TOKENS // 4), TROUBLES))
        self._chunks = 0
        self._stage: int | None = None
        """Whose server is next, once so many chunks are under way."""
        self._at_depth = 1
        self._sent: deque[SentStep] = deque(maxlen=8)
        self.under_way: list[int] = []
        """Each time, how many chunks had not come back."""

    async def send_embedded(self, *args: Any, **options: Any) -> SentStep:
        self._chunks += 1
        if self._stage is None and self._due and self._chunks >= self._due[0]:
            self._due.pop(0)
            self._stage = self._chance.randrange(len(self._client.fleet.spans))
            self._at_depth = self._chance.randint(1, 4)
            await self._client.replicas_of(self._stage)
        self._sent.append(step := await self._send(*args, **options))
        # What was under way may have come back while another server came: then it befalls a later chunk.
        under_way = sum(not step.ended for step in self._sent)
        if self._stage is not None:
            victim = self._victim(self._stage)
            if victim is not None and under_way >= self._at_depth:
                self.under_way.append(under_way)
                self._befall(victim)
                self._stage = None
            self._at_depth -= 1
        return step

    def _victim(self, stage: int) -> Member | None:
        """The session's server of a stage; None while that is one that leaves."""
        fleet = self._client.fleet
        start = fleet.spans[stage].start
        (peer,) = (each.server.peer for each in self._session.chain.stages if each.span.start == start)
        member: Member | None = fleet.members.get(peer)
        return member

    def _befall(self, victim: Member) -> None:
        fleet = self._client.fleet
        (fleet.kill if self._chance.random() < 0.75 else fleet.leave)(victim.peer)
        fleet.start_soon(victim.span)


def draft_with(model: Any, texts: list[list[int]], acceptance: float, chance: random.Random) -> None:
    """Have what comes next in these texts drafted, each token right or wrong by chance."""

    def script(text: list[int], k: int) -> list[int]:
        expected = next(each for each in texts if each[:8] == text[:8])
        right = expected[len(text) : len(text) + k]
        return [token if chance.random() < acceptance else (token + 1) % VOCABULARY for token in right]

    model._speculator.close()
    model._speculator = Speculator(VOCABULARY, [ScriptedSource(script, threaded=chance.random() < 0.5)])


@pytest.mark.parametrize(
    ("journal", "seed"), [(("client", "servers")[n % 2], n) for n in range(FIRST, LAST)], indirect=["journal"]
)
async def test_whatever_befalls_servers_the_text_is_that_of_plain_decoding(
    client: Any, talkative: Any, journal: str, seed: int
) -> None:
    chance, model = random.Random(seed), client.model
    speculation, way = SETTINGS[seed % len(SETTINGS)], WAYS[(seed + seed // 3) % len(WAYS)]
    prompts = PROMPTS if seed % 4 == 3 else PROMPTS[:1]
    acceptance = chance.choice([0.6, 0.85, 1.0])
    plain = model.generate_batch(prompts, max_new_tokens=TOKENS, speculation="off", **way)
    texts = await plain
    if not way:
        assert texts == [await talkative.reference.text(prompt, TOKENS) for prompt in prompts]
    begun = [model.tokenizer(prompt).input_ids for prompt in prompts]
    whole = [[*prompt, *tokens] for prompt, tokens in zip(begun, plain.tokens, strict=True)]
    draft_with(model, whole, acceptance, chance)
    async with model.session(sequences=len(prompts)) as session:
        trouble = Trouble(client, session, chance)
        drafted = model.generate_batch(
            prompts, max_new_tokens=TOKENS, session=session, speculation=speculation, **way
        )
        await drafted
    assert drafted.tokens == plain.tokens
    counts = drafted.speculation
    # A few drafts, as of control that finds rows dear on a busy machine, may all be right.
    assert acceptance == 1 or counts.drafted.total() < 60 or counts.accepted.total() < counts.drafted.total()
    assert len(client.failovers) >= len(trouble.under_way) / 2 > 0
    if len(prompts) == 1 and speculation.depth is not None:
        assert len(trouble.under_way) > TROUBLES / 2 and max(trouble.under_way) > 1
        assert acceptance == 1 or counts.recalled > 0
