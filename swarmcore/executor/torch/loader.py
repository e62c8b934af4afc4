"""The torch back end, as servers load it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.loader import BlockLoader, LoadSettings, Progress
from swarmcore.executor.torch.device import DTYPE_NAMES, choose_dtype, parse_device
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.sizing import block_needs, device_name, free_memory
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.types import Span


class TorchLoader(BlockLoader):
    """Blocks of a checkpoint, run by torch. Back ends that read the same checkpoints may subclass it."""

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        self.settings = settings
        self.checkpoint = open_checkpoint(settings.model, revision=settings.revision, progress=progress)
        self.model = self.checkpoint.info
        self.config = self.checkpoint.config

    def needs(self) -> BlockNeeds:
        settings = self.settings
        return block_needs(
            self.checkpoint,
            dtype=settings.dtype,
            device=settings.device,
            batch_tokens=settings.batch_tokens,
        )

    def free_memory(self) -> int:
        return free_memory(self.settings.device)

    def load(self, span: Span, *, progress: Progress | None = None) -> TorchExecutor:
        settings = self.settings
        return TorchExecutor.load(
            self.checkpoint,
            span,
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
            progress=progress,
        )

    def speed_key(self) -> Mapping[str, str]:
        settings = self.settings
        text = self.config.get_text_config(decoder=True)
        return {
            "dtype": DTYPE_NAMES[choose_dtype(settings.dtype, text, parse_device(settings.device))],
            "device": device_name(settings.device),
            "threads": str(settings.threads or f"best of {torch.get_num_threads()}"),
            "torch": str(torch.__version__),
        }
