"""Beam search of Transformers while servers are killed: the beams are those of the plain model."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import swarmcore
from swarmcore import sync
from swarmcore.loop_thread import background_loop
from swarmcore.testing.fleet import Fleet
from swarmcore.transformers import AutoModelForCausalLM, RemoteCache

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "The three most important things in life are"
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 14, "do_sample": False}


@pytest.fixture(autouse=True, scope="module")
def loop_in_a_thread() -> None:
    """Started before it is counted what a test leaves open."""
    background_loop()


class Killing(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing, but kills a server of the chain's next stage after every fourth token."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fleet: Fleet, cache: RemoteCache) -> None:
        self.loop, self.fleet, self.cache = loop, fleet, cache
        self.calls = self.killed = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls % 4 == 0 and self.killed < 3:
            assert self.cache.session is not None
            stages = self.cache.session.chain.stages
            peer = stages[self.killed * len(stages) // 3].server.peer
            asyncio.run_coroutine_threadsafe(self.kill(peer), self.loop).result(10)
            self.killed += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)

    async def kill(self, peer: Any) -> None:
        member = self.fleet.kill(peer)
        self.fleet.start_soon(member.span)


async def test_a_server_of_every_stage_is_killed(fleet: Fleet, smollm2_folder: Path, reference: Any) -> None:
    failovers: list[swarmcore.Failover] = []
    options = swarmcore.SessionOptions(on_failover=failovers.append, moves=None)
    ids = reference.tokenizer(PROMPT, return_tensors="pt")
    loop = asyncio.get_running_loop()

    def search() -> torch.Tensor:
        with sync.connect(*fleet.addresses) as swarm:
            model = AutoModelForCausalLM.from_pretrained(
                smollm2_folder, swarm=swarm, dtype="float32", session_options=options
            )
            swarm.wait_for_blocks(model.stack.model, timeout=30)
            cache = model.new_cache()
            killing = StoppingCriteriaList([Killing(loop, fleet, cache)])
            with model:
                found: torch.Tensor = model.generate(
                    **ids, past_key_values=cache, stopping_criteria=killing, **BEAMS
                )
            assert killing[0].killed == 3
        return found

    found = await asyncio.to_thread(search)
    plain = await asyncio.to_thread(partial(reference.plain.generate, **ids, **BEAMS))
    assert torch.equal(found, plain)
    assert len(failovers) >= 3
