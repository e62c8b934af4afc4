"""Transformers' tokenizers, of everything that models are loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swarmcore.checkpoint import open_checkpoint
from swarmcore.errors import InputError
from swarmcore.prompts import load_tokenizer
from swarmcore.types import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AutoTokenizer:
    """As Transformers' own, for GGUF files and packages too."""

    def __init__(self) -> None:
        raise InputError("make one with AutoTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of that folder, GGUF file or hub id; one without padding pads with its last token.

        Raise `ModelNotFoundError`, and `CheckpointError` when there is no tokenizer.
        """
        checkpoint = open_checkpoint(
            str(name_or_path), revision=revision, cache_dir=cache_dir, progress=progress
        )
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
