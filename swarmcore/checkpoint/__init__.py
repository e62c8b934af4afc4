"""Models on disk and on hubs: find one, and read only the tensors that are asked for.

What opens a model needs torch, which is imported with the first name that does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swarmcore.checkpoint.storage import cache_folder

if TYPE_CHECKING:
    from swarmcore.checkpoint.base import Checkpoint
    from swarmcore.checkpoint.source import convert, open_checkpoint

__all__ = ["Checkpoint", "cache_folder", "convert", "open_checkpoint"]

_PLACES = {"Checkpoint": "base", "convert": "source", "open_checkpoint": "source"}


def __getattr__(name: str) -> Any:
    if (module := _PLACES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swarmcore.imports import require_torch

    require_torch()
    return getattr(import_module(f"{__name__}.{module}"), name)
