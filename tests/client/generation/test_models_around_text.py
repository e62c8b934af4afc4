"""The text part of models for images: which tensors are its own, and whether its head is tied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.types import Span

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PERCEIVER = {
    "hidden_size": 32,
    "resampler_n_latents": 2,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 16,
    "num_key_value_heads": 2,
}
SQUARE = {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a perceiver with a norm of its own": (
        "Idefics2ForConditionalGeneration",
        "idefics2",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": VISION,
            "perceiver_config": PERCEIVER,
            "image_token_id": 63,
        },
    ),
    "positions put where the first tensor is": (
        "Idefics3ForConditionalGeneration",
        "idefics3",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": 63,
            "scale_factor": 1,
        },
    ),
    "tied, says the outer config alone": (
        "InternVLForConditionalGeneration",
        "internvl",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": VISION | SQUARE,
            "image_token_id": 63,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("case", MODELS)
@torch.inference_mode()
def test_the_text_part_is_that_of_the_whole_model(case: str, tmp_path: Path) -> None:
    name, model_type, arguments = MODELS[case]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **arguments)
    whole = getattr(transformers, name)(config).float().eval()
    for parameter in whole.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    whole.save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    if raw.get("tie_word_embeddings"):
        raw["text_config"].pop("tie_word_embeddings", None)
        (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    parts = LocalParts.load(checkpoint, dtype="float32")
    TorchExecutor.load(checkpoint, Span(1, 2))

    text = whole.get_decoder()
    hidden = torch.randn(3, 32)
    assert torch.equal(parts.embed([5, 6], [0, 1]), text.embed_tokens(torch.tensor([5, 6])))
    torch.testing.assert_close(parts.logits(hidden), whole.get_output_embeddings()(text.norm(hidden)))
