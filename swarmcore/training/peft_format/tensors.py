"""``adapter_model.safetensors``: checked as a whole when it is opened, its tensors read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open

from swarmcore.checkpoint.storage import save_file
from swarmcore.errors import AdapterError

TENSOR_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"


class AdapterTensors:
    """The tensors of an adapter's folder, by their names in the file. Use it in a ``with``."""

    def __init__(self, folder: Path) -> None:
        """Raise `AdapterError` when there is no such file, or it is damaged."""
        self.file = folder / TENSOR_FILE
        if not self.file.is_file():
            if (folder / _PICKLE_FILE).exists():
                raise AdapterError(
                    f"{folder} has its weights as a pickle, which can run any code and is never read; "
                    f"where you trust it, load it with PEFT and save it again: safe_serialization=True "
                    f"writes {TENSOR_FILE}"
                )
            raise AdapterError(f"{folder} has no {TENSOR_FILE}; copy the adapter again")
        try:
            self._open = cast(Any, safe_open(self.file, framework="pt"))
        except (SafetensorError, OSError, ValueError) as exc:
            raise AdapterError(f"{self.file} is damaged, copy it again: {exc}") from exc
        self.names: list[str] = sorted(self._open.keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """In float32, bfloat16 or float16. Raise `AdapterError` for other values, and those not finite."""
        try:
            values: torch.Tensor = self._open.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as exc:
            raise AdapterError(f"{name} of {self.file} cannot be read, copy it again: {exc}") from exc
        if not values.is_floating_point() or values.dtype.itemsize < 2:
            raise AdapterError(f"{name} of {self.file} is {values.dtype}; save it in float32 or bfloat16")
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(
                f"{name} of {self.file} has values that are not finite: the training went astray, take an "
                f"earlier checkpoint"
            )
        return values.float() if values.dtype == torch.float64 else values


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """All or nothing. Raise `StorageError` when the disk refuses."""
    from safetensors.torch import save

    plain = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    save_file(folder / TENSOR_FILE, save(plain, metadata={"format": "pt"}))
