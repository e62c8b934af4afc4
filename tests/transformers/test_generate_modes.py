"""Transformers' generate over a swarm gives what it gives of the plain model, in every mode that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_swarm import Tiny

PROMPTS = torch.tensor([[0, 0, 0, 17, 80, 33, 5], [9, 41, 7, 66, 12, 100, 31]])
MASK = (PROMPTS > 0).long()


def both(tiny: Tiny, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What the plain and the remote model make of the same call."""
    outputs = []
    for model in (tiny.plain, tiny.remote):
        torch.manual_seed(seed)
        outputs.append(model.generate(**{"max_new_tokens": 12, "min_new_tokens": 12} | options))
    return outputs[0], outputs[1]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "processors": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "ending early": {"num_beams": 3, "early_stopping": True, "min_new_tokens": 0, "max_new_tokens": 20},
    "prompt in pieces": {"do_sample": False, "prefill_chunk_size": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_the_plain_model(llama: Tiny, mode: str) -> None:
    plain, remote = both(llama, input_ids=PROMPTS, attention_mask=MASK, **MODES[mode])
    assert torch.equal(plain, remote)
    assert llama.sessions_end(), "its session is closed"
