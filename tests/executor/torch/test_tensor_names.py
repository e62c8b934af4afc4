"""Which tensors of a checkpoint are the text model's, in the layouts that larger models around it have."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarmcore.errors import CheckpointError
from swarmcore.executor.torch.structure import Structure
from swarmcore.executor.torch.tensor_names import TextTensors, is_computed, text_tower

LLAMA = Structure("model", "layers", ("norm",))
KEYS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


class Config:
    def __init__(self, *, composite: bool) -> None:
        self.composite = composite

    def get_text_config(self, decoder: bool) -> Any:
        return object() if self.composite else self


def names_of(*names: str, composite: bool = False) -> Any:
    return SimpleNamespace(name="a model", names=lambda: list(names), config=Config(composite=composite))


class Model:
    """As much of a model as says what it has no place for."""

    _keys_to_ignore_on_load_unexpected = (r"^model\.old\.",)

    def get_output_embeddings(self) -> object:
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


def unexpected(checkpoint: Any) -> Collection[str]:
    tensors = TextTensors.of(checkpoint, LLAMA)
    found = tensors.find(KEYS, "model")
    return tensors.unexpected(tensors.names - set(found), found, Model())


@pytest.mark.parametrize(
    ("tower", "head"),
    [
        ("model.", "lm_head.weight"),
        ("", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("thinker.model.", "thinker.lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
    ],
)
def test_the_final_norm_is_where_the_blocks_are(tower: str, head: str) -> None:
    checkpoint = names_of(
        f"{tower}layers.0.mlp.up_proj.weight",
        f"{tower}embed_tokens.weight",
        f"{tower}norm.weight",
        head,
        "model.connector.perceiver_resampler.norm.weight",
        "model.vision_model.layers.0.weight",
        "model.vision_model.layers.1.weight",
        "a.norm.weight",
        composite=True,
    )
    assert text_tower(checkpoint, LLAMA) == tower
    found = TextTensors.of(checkpoint, LLAMA).find(KEYS, "model")
    assert found == {f"{tower}embed_tokens.weight": KEYS[0], f"{tower}norm.weight": KEYS[1], head: KEYS[2]}


def test_another_copy_of_the_model_is_left_alone() -> None:
    own = ("model.layers.0.a", "model.layers.1.a")
    for copy in ("draft", "ema"):
        more = [f"{copy}.{name}" for name in (*own, "model.layers.2.a")]
        assert text_tower(names_of(*more, *own), LLAMA) == "model."


def test_no_blocks() -> None:
    with pytest.raises(CheckpointError, match=r"no tensors named layers\.0"):
        text_tower(names_of("model.norm.weight", "model.vision.layers.0.weight"), LLAMA)


PLAIN = ("model.layers.0.x.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "name", ["lm_head.bias", "model.norm.bias", "logit_scale", "model.embed_norm.weight", "lm_head.scales"]
)
@pytest.mark.parametrize("tower", ["model.", "model.decoder."])
def test_what_a_text_model_has_no_place_for(tower: str, name: str) -> None:
    plain = [each.replace("model.", tower) for each in PLAIN]
    assert unexpected(names_of(*plain, name.replace("model.", tower))) == {name.replace("model.", tower)}


@pytest.mark.parametrize(
    "name",
    [
        "score.weight",
        "v_head.summary.weight",
        "mtp.fc.weight",
        "model.mtp_layers.0.weight",
        "model.layers.9.eh_proj.weight",
        "model.old.weight",
        "model.rotary_emb.inv_freq",
    ],
)
def test_what_is_of_no_use_here(name: str) -> None:
    assert not unexpected(names_of(*PLAIN, name))


def test_other_parts_of_a_larger_model() -> None:
    others = ("vision_tower.weight", "multi_modal_projector.weight", "image_newline", "audio.norm.weight")
    assert not unexpected(names_of(*PLAIN, *others, composite=True))
    assert unexpected(names_of(*PLAIN, "lm_head.bias", composite=True)) == {"lm_head.bias"}
    text = [name.replace("model.", "model.language_model.") for name in PLAIN]
    found = unexpected(names_of(*text, *others, "model.language_model.scale", composite=True))
    assert found == {"model.language_model.scale"}


def test_masks_are_told_from_biases_by_their_shape() -> None:
    assert is_computed("h.0.attn.bias", torch.ones(1, 1, 8, 8))
    assert is_computed("h.0.attn.bias", torch.ones(8, 8))
    assert not is_computed("h.0.attn.bias", torch.ones(8))
    assert not is_computed("h.0.attn.bias", torch.ones(8, 4))
    assert is_computed("h.0.attn.masked_bias")
    assert not is_computed("h.0.attn.c_attn.bias")
