"""From what people type as a draft to a model that drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.speculation.draft_model import DraftModel
from swarmcore.client.speculation.local_decoder import LocalDecoder
from swarmcore.client.speculation.vocabulary import vocabulary_of
from swarmcore.executor.loader import LoadSettings, choose_executor, open_loader
from swarmcore.prompts import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarmcore.types import Progress


def load_draft_model(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> DraftModel:
    """Load the causal language model ``source``, a folder, GGUF or hub id, to draft for the one with
    ``tokenizer`` and ``vocab_size``. Blocks: run it in a thread.

    It is run as a server would run all of its blocks: by llama.cpp where it is a GGUF and that is installed,
    else by torch. Raise as `open_checkpoint`, `open_loader` and `vocabulary_of`.
    """
    settings = LoadSettings(model=source, revision=revision, dtype=dtype, device=device, threads=threads)
    checkpoint = open_checkpoint(source, revision=revision, progress=progress)
    theirs = load_tokenizer(checkpoint.folder, checkpoint.name)
    draft_size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    vocabulary = vocabulary_of(tokenizer, vocab_size, theirs, draft_size, checkpoint.name)
    loader = open_loader(choose_executor(settings), settings, progress=progress)
    parts = LocalParts.load(checkpoint, dtype=dtype, progress=progress)
    executor = loader.load(loader.model.span, progress=progress)
    return DraftModel(LocalDecoder(parts, executor), vocabulary)
