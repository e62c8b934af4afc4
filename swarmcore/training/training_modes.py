"""What trainers ask of a model and servers do not do: activation checkpointing and dropout."""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)


class NoActivationCheckpointing:
    """For a subclass of Transformers' ``PreTrainedModel`` whose blocks are remote, before that in its bases.

    Servers keep the activations of their blocks where they have room, and compute them again where they have
    not, whatever is asked for here.
    """

    @property
    def is_activation_checkpointing(self) -> bool:
        return False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return False

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Do nothing, and say so once."""
        _note_checkpointing()

    def activation_checkpointing_disable(self) -> None:
        """Do nothing."""

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Do nothing, and say so once."""
        _note_checkpointing()

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing."""


@functools.cache
def _note_checkpointing() -> None:
    logger.warning(
        "gradient checkpointing makes no difference: the blocks' activations are on the servers, which "
        "compute them again where they have no room for them"
    )


_OF_THE_CLIENT = ("embd_pdrop", "embed_pdrop", "emb_pdrop", "classifier_dropout", "summary_first_dropout")
"""Drawn outside of the blocks."""


def note_dropout(config: Any) -> None:
    """Say once that the dropout which this config asks for inside of the blocks is left out."""
    asked = {
        name: value
        for name, value in vars(config).items()
        if name.endswith(("dropout", "pdrop")) and value and name not in _OF_THE_CLIENT
    }
    if asked:
        _note_dropout(
            config.model_type, ", ".join(f"{name}={value}" for name, value in sorted(asked.items()))
        )


@functools.cache
def _note_dropout(model_type: str, asked: str) -> None:
    logger.warning(
        "the config of this %s asks for dropout inside of its blocks (%s): servers compute as in evaluation, "
        "so it is left out",
        model_type,
        asked,
    )
