"""kill -9 at every position and every stage that `test_every_token` leaves out, of a tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from byte_tokenizer import byte_tokenizer
from kills import text_amid_kills
from tiny_models import save_random_model, tiny_config

from swarmcore.testing.fleet import Fleet
from swarmcore.types import Span

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PRINTABLE = 94
"""The first so many tokens of the byte tokenizer are one printable character each."""
PROMPT = "Once-upon-a-time"
TOKENS = 40


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model that neither ends nor repeats itself, and where it is saved."""
    folder = tmp_path_factory.mktemp("talkative")
    config = tiny_config("llama")
    config.vocab_size, config.eos_token_id = PRINTABLE, None
    model = save_random_model(config, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_fleet(make_fleet: Callable[..., Fleet], talkative: Any) -> AsyncIterator[Fleet]:
    async with make_fleet(model=talkative[1], spans=[Span(0, 2), Span(2, 4), Span(4, 5)]) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def plain_text(talkative: Any) -> str:
    """What plain Transformers says, which is not the same thing over and over."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = talkative[0].generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, ids.input_ids.shape[1] :])
    assert len(set(text)) > TOKENS // 2
    return text


@pytest.mark.parametrize("first_stage", [1, 2])
async def test_a_server_is_killed_before_every_token(
    client: Any, plain_text: str, delays: Callable[[str], list[float]], first_stage: int
) -> None:
    text = await text_amid_kills(
        client, PROMPT, TOKENS, delays("tiny model: kill -9 to the next token"), first_stage
    )
    assert text == plain_text
    assert len(client.failovers) >= TOKENS
