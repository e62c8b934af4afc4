"""Families that do not attend through transformers' ``AttentionInterface``, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmcore.executor.torch import bloom, falcon

REPLACE_ATTENTION: dict[str, Callable[[Any], None]] = {
    "bloom": bloom.replace_attention,
    "falcon": falcon.replace_attention,
}
"""Given a base model, replaces the attention of its blocks by one that calls the current batch."""
