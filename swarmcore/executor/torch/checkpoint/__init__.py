"""Models on disk and on hubs: find one, and read only the tensors that are asked for."""

from swarmcore.executor.torch.checkpoint.base import Checkpoint
from swarmcore.executor.torch.checkpoint.cache import cache_folder
from swarmcore.executor.torch.checkpoint.progress import Progress
from swarmcore.executor.torch.checkpoint.source import convert, open_checkpoint

__all__ = ["Checkpoint", "Progress", "cache_folder", "convert", "open_checkpoint"]
