"""Models on disk and on hubs: find one, and read only the tensors that are asked for."""

from swarmcore.imports import require_torch

require_torch()

from swarmcore.checkpoint.base import Checkpoint  # noqa: E402
from swarmcore.checkpoint.source import convert, open_checkpoint  # noqa: E402
from swarmcore.checkpoint.storage import cache_folder  # noqa: E402

__all__ = ["Checkpoint", "cache_folder", "convert", "open_checkpoint"]
