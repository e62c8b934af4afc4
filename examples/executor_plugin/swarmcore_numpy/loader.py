"""From a checkpoint to blocks in NumPy: what the entry point names."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
import torch

from swarmcore.errors import InputError
from swarmcore.executor.loader import LoadSettings
from swarmcore.executor.torch.loader import TorchLoader
from swarmcore.types import Progress, Span
from swarmcore_numpy.executor import NumpyExecutor
from swarmcore_numpy.llama import Block, Shape


class NumpyLoader(TorchLoader):
    """Finds and reads checkpoints as the torch back end does, fingerprint included; computes on its own."""

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        if settings.device != "cpu" or settings.dtype not in ("auto", "float32"):
            raise InputError("the executor numpy computes on the cpu, in float32")
        super().__init__(attrs.evolve(settings, dtype="float32"), progress=progress)
        self._shape = Shape.of(self.config)
        self.config = None  # no adapters

    def load(self, span: Span, *, progress: Progress | None = None) -> NumpyExecutor:  # type: ignore[override]
        return NumpyExecutor(self.model, span, self._shape, self._blocks, progress)

    def speed_key(self) -> Mapping[str, str]:
        return {"numpy": np.__version__}

    def _blocks(self, span: Span, progress: Progress | None) -> dict[int, Block]:
        wanted: dict[str, tuple[int, str]] = {}
        for name in self.checkpoint.names():
            prefix, _, rest = name.partition("layers.")
            number, _, part = rest.partition(".")
            if prefix == "model." and number.isdigit() and int(number) in span:
                wanted[name] = int(number), part
        read = self.checkpoint.read(list(wanted), progress=progress)
        parts: dict[int, dict[str, np.ndarray]] = {block: {} for block in range(span.start, span.end)}
        for name, (block, part) in wanted.items():
            parts[block][part] = read[name].to(torch.float32).numpy()
        return {block: Block(self._shape, weights) for block, weights in parts.items()}
