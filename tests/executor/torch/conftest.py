"""A tiny Llama on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarmcore.executor.torch.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def tiny_llama(tiny_llama_folder: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama_folder))
