"""kill -9 at every position and every stage that `test_every_token` leaves out, of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kills import text_amid_kills

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once-upon-a-time"
TOKENS = 32


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
