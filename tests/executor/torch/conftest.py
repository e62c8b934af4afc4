"""A tiny Llama on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_random_model, tiny_config

from swarmcore.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_random_model(tiny_config("llama"), folder)
    return folder


@pytest.fixture
def tiny_llama(tiny_llama_folder: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama_folder))
