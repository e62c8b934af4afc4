"""Models on disk and on hubs: find one, and read only the tensors that are asked for."""

from swarmcore.checkpoint.base import Checkpoint, Progress, cache_folder
from swarmcore.checkpoint.source import convert, open_checkpoint

__all__ = ["Checkpoint", "Progress", "cache_folder", "convert", "open_checkpoint"]
