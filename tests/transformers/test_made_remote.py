"""Which module of a model sends hidden states through the swarm."""

from __future__ import annotations

from typing import Any, cast

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from swarmcore.errors import UnsupportedModelError
from swarmcore.transformers.base_model import make_remote

SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def made(model_type: str, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **settings))
    make_remote(model, cast(Any, object()))
    return model


def test_the_decoder_within_the_base_model() -> None:
    """The head of OPT calls it past the base model."""
    model = made("opt", ffn_dim=32, word_embed_proj_dim=32)
    assert hasattr(model.model.decoder, "stack")
    assert not hasattr(model.model, "stack")


def test_a_norm_that_is_called_before_the_blocks_too() -> None:
    with pytest.raises(UnsupportedModelError, match="uses it before them, too"):
        made("nanochat", intermediate_size=32, num_key_value_heads=2)
