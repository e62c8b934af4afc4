"""Dropout that a model's config asks for in training, and servers do not draw."""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

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
        _note(config.model_type, ", ".join(f"{name}={value}" for name, value in sorted(asked.items())))


@functools.cache
def _note(model_type: str, asked: str) -> None:
    logger.warning(
        "the config of this %s asks for dropout inside of its blocks (%s): servers compute as in evaluation, "
        "so it is left out",
        model_type,
        asked,
    )
