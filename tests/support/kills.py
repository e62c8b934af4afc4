"""Servers that are killed while a text is generated."""

from __future__ import annotations

import asyncio
from typing import Any


async def text_amid_kills(
    client: Any, prompt: str, tokens: int, delays: list[float], first_stage: int = 0
) -> str:
    """A text before each token of which a server of the next stage in turn is killed, and replaced.

    ``delays`` gets the seconds from each kill to the next token.
    """
    clock = asyncio.get_running_loop().time
    fleet, text = client.fleet, ""
    async with client.model.session() as session:
        generation = client.model.generate(prompt, session=session, max_new_tokens=tokens, speculation="off")
        for position in range(tokens):
            # What replaces the servers of the other stages may still be starting.
            stage = (first_stage + position) % len(fleet.spans)
            await client.replicas_of(stage)
            victim = client.serving(session, stage)
            fleet.kill(victim.peer)
            fleet.start_soon(victim.span)
            began = clock()
            text += await anext(generation)
            delays.append(clock() - began)
            assert generation.new_tokens == position + 1
    return text
