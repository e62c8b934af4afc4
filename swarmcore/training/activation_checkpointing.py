"""Activation checkpointing, as Trainer turns it on: of no use where the activations are on servers."""

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
        _note()

    def activation_checkpointing_disable(self) -> None:
        """Do nothing."""

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Do nothing, and say so once."""
        _note()

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing."""


@functools.cache
def _note() -> None:
    logger.warning(
        "gradient checkpointing makes no difference: the blocks' activations are on the servers, which "
        "compute them again where they have no room for them"
    )
