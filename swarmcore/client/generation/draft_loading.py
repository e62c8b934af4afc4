"""From what people name as a draft to what makes drafts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.speculation.draft_heads import DraftHeads
from swarmcore.client.speculation.draft_model import DraftModel
from swarmcore.client.speculation.drafter import DraftSource
from swarmcore.client.speculation.head_loading import is_eagle, load_eagle_head, load_mtp_head
from swarmcore.client.speculation.local_decoder import LocalDecoder
from swarmcore.client.speculation.vocabulary import vocabulary_of
from swarmcore.errors import InputError, MissingExtraError, UnsupportedModelError
from swarmcore.executor.loader import AUTO, LoadSettings, choose_executor, open_loader
from swarmcore.executor.torch.quantized_matrix import choose_weights
from swarmcore.prompts import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarmcore.types import Progress


log = logging.getLogger(__name__)

HEADS = "heads"
"""In place of a draft model: the layer of the model's own that predicts one token further."""


def load_draft(
    draft: str,
    model: Checkpoint,
    parts: LocalParts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> DraftSource:
    """What ``draft`` names, to draft for the ``model`` of which a client has ``parts`` and ``tokenizer``.

    That is `HEADS`, an EAGLE head, or a causal language model; the last two as a folder, a GGUF, or a hub id.
    A draft model runs as a server would run all of its blocks: by llama.cpp where it is a GGUF and that is
    installed, else by torch. Blocks: run it in a thread. Raise as `open_checkpoint`, `open_loader`,
    `load_mtp_head`, `load_eagle_head` and `vocabulary_of`.
    """
    if draft == HEADS:
        return DraftHeads(load_mtp_head(model, dtype=dtype), parts)
    checkpoint = open_checkpoint(draft, revision=revision, progress=progress)
    if is_eagle(checkpoint):
        head = load_eagle_head(checkpoint, parts.hidden_size, parts.vocab_size, dtype=dtype)
        return DraftHeads(head, parts)
    theirs = load_tokenizer(checkpoint.folder, checkpoint.name)
    draft_size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    vocabulary = vocabulary_of(tokenizer, parts.vocab_size, theirs, draft_size, checkpoint.name)
    settings = LoadSettings(model=draft, revision=revision, dtype=dtype, device=device, threads=threads)
    decoder = load_decoder(checkpoint, settings, progress=progress, rounded=dtype == AUTO)
    return DraftModel(decoder, vocabulary)


def load_decoder(
    checkpoint: Checkpoint,
    settings: LoadSettings,
    *,
    rounded: bool = False,
    progress: Progress | None = None,
) -> LocalDecoder:
    """The whole model of ``settings``, which is also opened as ``checkpoint``, to run in this process.

    With ``rounded`` its output layer, a third of the work of a small model, is kept in 4 bits where that is
    faster. Raise as `open_loader` and `LocalParts.load`.
    """
    loader = open_loader(choose_executor(settings), settings, progress=progress)
    parts = LocalParts.load(checkpoint, dtype=settings.dtype, progress=progress)
    if rounded:
        _round_head(parts)
    executor = loader.load(loader.model.span, progress=progress)
    return LocalDecoder(parts, executor, threads=settings.threads)


def _round_head(parts: LocalParts) -> None:
    for kind in ("nf4", "int4"):
        try:
            choose_weights(kind, None, torch.device("cpu"))
        except (InputError, MissingExtraError):
            continue  # a library or a kernel is not there
        try:
            if parts.round_head(kind):
                return
        except UnsupportedModelError as exc:
            log.info("the output layer of the draft model stays as it is: %s", exc)
