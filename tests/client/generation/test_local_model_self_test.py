"""The self-test of the client's part: it passes what is right and finds what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, save_random_model, tiny_config
from transformers import (
    CLIPVisionConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.torch import self_test
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.types import Span

TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWARMCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "_remembered", set())


def opened(family: str, folder: Path) -> Checkpoint:
    save_random_model(tiny_config(family), folder / "model")
    return open_checkpoint(str(folder / "model"))


@pytest.mark.parametrize("family", ["granite", "gpt2", "gemma2"])
def test_embeddings_that_differ_are_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when what a family does between its embeddings and its first block were left out."""

    def plain(self: LocalParts, ids: list[int], positions: range) -> torch.Tensor:
        embeddings: Any = self._embedding_model.get_input_embeddings()
        return torch.nn.functional.embedding(torch.tensor(ids), embeddings.weight)

    monkeypatch.setattr(LocalParts, "embed", plain)
    with pytest.raises(UnsupportedModelError, match="into the first block is off by"):
        LocalParts.load(opened(family, tmp_path))


@pytest.mark.parametrize("wrong", [lambda logits: 2 * logits, lambda logits: logits[:, :-1]])
def test_logits_that_differ_are_refused(wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LocalParts.logits
    monkeypatch.setattr(LocalParts, "logits", lambda self, hidden: wrong(right(self, hidden)))
    with pytest.raises(UnsupportedModelError, match="logits are off by"):
        LocalParts.load(opened("llama", tmp_path))


def composite(folder: Path, model: Any) -> Checkpoint:
    model.eval().save_pretrained(folder)
    return open_checkpoint(str(folder))


def test_the_text_part_of_a_model_for_images_is_served(tmp_path: Path) -> None:
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_id=100)
    checkpoint = composite(tmp_path, LlavaForConditionalGeneration(config))
    LocalParts.load(checkpoint)
    TorchExecutor.load(checkpoint, Span(1, 3))


@pytest.mark.parametrize("named", [[], ["pipeline"], ["NoSuchModel"]], ids=str)
def test_a_config_that_names_no_model_is_taken_for_its_type(named: list[str], tmp_path: Path) -> None:
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_id=100)
    checkpoint = composite(tmp_path, LlavaForConditionalGeneration(config))
    checkpoint.config.architectures = named
    LocalParts.check(checkpoint)


def test_a_scale_that_the_model_around_the_text_model_does_not_have(tmp_path: Path) -> None:
    """Granite divides its logits; Llava around it does not."""
    text = GraniteConfig(**SIZES, logits_scaling=8.0)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_id=100)
    with pytest.raises(UnsupportedModelError, match="logits are off by"):
        LocalParts.load(composite(tmp_path, LlavaForConditionalGeneration(config)))


def test_a_prompt_that_attends_both_ways_is_refused(tmp_path: Path) -> None:
    """PaliGemma attends to the whole prompt, the text model in it to what came before."""
    text = {**SIZES, "model_type": "gemma", "head_dim": 16}
    config = PaliGemmaConfig(
        text_config=text, vision_config=SiglipVisionConfig(**TOWER), projection_dim=64, image_token_id=100
    )
    checkpoint = composite(tmp_path, PaliGemmaForConditionalGeneration(config))
    with pytest.raises(UnsupportedModelError, match="would differ"):
        TorchExecutor.load(checkpoint, Span(0, 2))
