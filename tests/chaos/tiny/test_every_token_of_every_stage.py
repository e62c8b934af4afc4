"""kill -9 at every position and every stage that `test_every_token` leaves out, of a tiny model; and with
several drafted chunks under way."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from kills import text_amid_kills

import swarmcore
from swarmcore.testing.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once-upon-a-time"
TOKENS = 32
DRAFTED_TOKENS, DEPTH, KILLS = 80, 3, 6


@pytest.mark.parametrize("first_stage", [1, 2])
async def test_a_server_is_killed_before_every_token(
    client: Any, talkative: Any, delays: Callable[[str], list[float]], first_stage: int
) -> None:
    text = await text_amid_kills(
        client, PROMPT, TOKENS, delays("tiny model: kill -9 to the next token"), first_stage
    )
    assert text == await talkative.reference.text(PROMPT, TOKENS)
    assert len(set(text)) > TOKENS // 2, "it says something"
    assert len(client.failovers) >= TOKENS


async def drafted_text(
    session: swarmcore.ModelSession,
    text: list[int],
    guess: Callable[[int], int],
    tokens: int,
    trouble: Callable[[int], Any],
) -> int:
    """Greedily add ``tokens`` to ``text``, verifying guesses a few at a time; how often some were wrong.

    ``trouble`` is awaited with their number so far whenever a window is full.
    """
    end, rejections = len(text) + tokens, 0
    text.append(int((await session.step([text]))[0].argmax()))
    under_way: deque[Any] = deque()
    ahead: list[int] = []
    while len(text) < end:
        while len(under_way) < DEPTH:
            certain = [] if under_way else text[-1:]
            drafts = [guess(len(text) + len(ahead) + i) for i in range(4 - len(certain))]
            under_way.append(await session.send([certain + drafts]))
            ahead += drafts
        await trouble(len(text))
        for row in await session.receive(under_way.popleft()):
            text.append(int(row.argmax()))
            if ahead and ahead.pop(0) != text[-1]:
                break
        else:
            continue
        rejections += 1
        if under_way:
            await session.recall(under_way[0])
            under_way.clear()
        ahead.clear()
        session.rollback(len(text) - 1)
    del text[end:]
    return rejections


@pytest.mark.parametrize("journal", ["client", "servers"], indirect=True)
async def test_servers_are_killed_in_the_middle_of_windows(
    client: Any, fleet: Fleet, talkative: Any, journal: str
) -> None:
    chance = random.Random(journal)
    tokenizer = talkative.reference.tokenizer
    expected = tokenizer(PROMPT + await talkative.reference.text(PROMPT, DRAFTED_TOKENS)).input_ids
    text: list[int] = tokenizer(PROMPT).input_ids
    killed_at = set(chance.sample(range(len(text) + 2, len(expected) - 8), KILLS))

    def guess(position: int) -> int:
        right = expected[position] if position < len(expected) else 0
        return right if chance.random() < 0.85 else (right + 1) % 94

    async def trouble(length: int) -> None:
        if due := {at for at in killed_at if at <= length}:
            killed_at.difference_update(due)
            stage = chance.randrange(3)
            await client.replicas_of(stage)
            victim = client.serving(session, stage)
            fleet.kill(victim.peer)
            fleet.start_soon(victim.span)

    async with client.model.session() as session:
        assert session.max_in_flight >= DEPTH
        rejections = await drafted_text(session, text, guess, DRAFTED_TOKENS, trouble)
    assert text == expected
    assert rejections > 3 and len(client.failovers) >= KILLS / 2
