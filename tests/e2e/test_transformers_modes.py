"""Transformers' own generate and forward on the real model over three server processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from swarmcore import sync
from swarmcore.testing.processes import ServerProcess
from swarmcore.transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam search": {"num_beams": 2, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def face(three_servers: list[ServerProcess], smollm2_folder: Path) -> AsyncIterator[tuple[Any, Any]]:
    """The model over three servers as Transformers has it, and its tokenizer."""

    def load() -> tuple[sync.Swarm, Any, Any]:
        swarm = sync.connect(three_servers[0].address)
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder, swarm=swarm, dtype="float32")
        swarm.wait_for_blocks(model.stack.model, timeout=30)
        return swarm, model, AutoTokenizer.from_pretrained(smollm2_folder)

    swarm, model, tokenizer = await asyncio.to_thread(load)
    yield model, tokenizer
    await asyncio.to_thread(model.close)
    await asyncio.to_thread(swarm.close)


def generated(model: Any, inputs: Any, mode: str) -> torch.Tensor:
    torch.manual_seed(7)
    found: torch.Tensor = model.generate(**inputs, max_new_tokens=6, **MODES[mode])
    return found


@pytest.mark.parametrize("mode", MODES)
async def test_equal_to_the_plain_model(face: tuple[Any, Any], plain_smollm2: Any, mode: str) -> None:
    model, tokenizer = face
    prompts = (
        ["The sea is", "Once upon a time there was a"] if mode != "prompt lookup" else ["one, two, one,"]
    )
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    remote = await asyncio.to_thread(generated, model, inputs, mode)
    plain = await asyncio.to_thread(generated, plain_smollm2, inputs, mode)
    assert torch.equal(remote, plain)


def loss_and_gradient(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, embeds)
    return loss.detach(), gradient


async def test_losses_and_gradients(face: tuple[Any, Any], plain_smollm2: Any) -> None:
    model, tokenizer = face
    ids = tokenizer("All happy families are alike.", return_tensors="pt").input_ids
    remote = await asyncio.to_thread(loss_and_gradient, model, ids)
    plain = await asyncio.to_thread(loss_and_gradient, plain_smollm2, ids)
    torch.testing.assert_close(remote[0], plain[0], rtol=1e-4, atol=0)
    assert (remote[1] - plain[1]).abs().max() <= 1e-4 * plain[1].abs().max()
