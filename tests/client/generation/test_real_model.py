"""The real small model, its blocks in this process: text, chat and batches as plain transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.model import RemoteModel

pytestmark = pytest.mark.e2e

PROMPTS = [
    "The capital of France is",
    "Water",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the",
]


@pytest.fixture
async def real_model(smollm2_folder: Path, plain_smollm2: Any, sessions):
    sessions.plain = plain_smollm2
    model = await RemoteModel.from_checkpoint(open_checkpoint(str(smollm2_folder)), sessions, dtype="float32")
    yield model
    await model.close()


def generated(whole: Any, ids: list[int], tokens: int, seed: int | None = None, **options: Any) -> list[int]:
    if seed is not None:
        torch.manual_seed(seed)
    with torch.inference_mode():
        output = whole.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=seed is not None,
            **options,
        )
    return output[0, len(ids) :].tolist()


async def test_a_batch_of_prompts_of_different_lengths(real_model, plain_smollm2, smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    texts = await real_model.generate_batch(PROMPTS, max_new_tokens=5)
    expected = [generated(plain_smollm2, tokenizer(prompt)["input_ids"], 5) for prompt in PROMPTS]
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]


async def test_chat_and_seeded_sampling(real_model, plain_smollm2, smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    messages = [{"role": "user", "content": "Name a colour."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    generation = real_model.generate(messages, max_new_tokens=8, seed=11, **options)
    await generation
    assert generation.tokens == generated(plain_smollm2, ids, 8, seed=11, **options)


async def test_characters_of_several_tokens(real_model):
    """What is generated is written anyway as the tokens say; here the tokens are given."""
    text = "Grüße 😀 日本語, naïve — “quoted”"
    tokens = iter(real_model.tokenizer(text)["input_ids"])

    def dictated(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = next(tokens, real_model.tokenizer.eos_token_id)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    generation = real_model.generate("Say:", max_new_tokens=60, logits_processors=[dictated])
    pieces = [piece async for piece in generation]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert generation.finish_reason == "eos"
