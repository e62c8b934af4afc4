"""Quantised checkpoints: dequantised as they are read where their format is known, else refused by name.

A weight in 8 bits means nothing without its scale, and a loader that knows neither takes it for what it
would mean in 16. So what says that weights are quantised is looked for everywhere it has been put, and a
tensor in fewer than 16 bits that nothing explains is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from swarmcore.checkpoint.base import Checkpoint
from swarmcore.checkpoint.packed_formats import Layout
from swarmcore.checkpoint.quantization_settings import Scheme, find_settings, scheme_of
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.types import Progress

_OF_ACTIVATIONS = re.compile(
    r"(^|\.)(activation_scale|input_scale|input_scale_ub|input_global_scale|output_scale|[qkv]_scale"
    r"|[kv]_zero_point"
    r"|input_zero_point|output_zero_point)$"
)
"""Scales of what a layer takes and gives: without rounding activations, they cancel out."""
_PLAIN = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_PACKED_NAME = re.compile(
    r"(scale(_inv|_2)?|scales|SCB|qweight|qzeros|g_idx|absmax|quant_map|quant_state\..+|weight_packed"
    r"|zero_point|zeros|blocks|codes|codebooks|weight_format)$"
)


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with plain tensors: itself when nothing in its settings says that it is quantised.

    Raise `UnsupportedModelError` for a quantisation that is not undone here.
    """
    found = find_settings(checkpoint.raw_config, checkpoint.folder)
    if not found:
        return checkpoint
    schemes = {scheme_of(checkpoint.name, where, settings) for where, settings in found}
    if len(schemes) > 1:
        raise UnsupportedModelError(
            f"{checkpoint.name} says in several places how it is quantised, and not the same: "
            f"{', '.join(where for where, _ in found)}"
        )
    for config in (checkpoint.config, checkpoint.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would look for packed tensors in what is read
    return DequantizedCheckpoint(checkpoint, schemes.pop())


def check_plain(name: str, tensors: Mapping[str, torch.Tensor], buffers: Collection[str] = ()) -> None:
    """Raise `UnsupportedModelError` when a tensor is no plain weight, but packed in 8 bits or whole numbers.

    ``buffers`` are the tensors that are whole numbers by their nature.
    """
    packed = sorted(
        key for key, data in tensors.items() if data.dtype not in _PLAIN and key not in set(buffers)
    )
    if packed:
        dtype = str(tensors[packed[0]].dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{name} has tensors that are no plain weights, such as {packed[0]} ({dtype}), and its settings "
            f"do not say how to read them; use its bfloat16, float16 or float32 checkpoint"
        )


def unexpected_tensors(name: str, unexpected: Collection[str]) -> UnsupportedModelError:
    """The error for tensors that the model's own classes have no place for."""
    names = sorted(unexpected)
    packed = next((key for key in names if _PACKED_NAME.search(key)), None)
    guess = "; it looks quantised, in a way that its config does not name" if packed else ""
    return UnsupportedModelError(
        f"{name} has {len(names)} tensors that its model class does not know, such as {packed or names[0]}"
        f"{guess}; without them the results would be wrong"
    )


class DequantizedCheckpoint(Checkpoint):
    """Another checkpoint: its packed weights are given in its config's dtype, their scales not at all."""

    def __init__(self, stored: Checkpoint, scheme: Scheme) -> None:
        self.name, self.folder, self.info = stored.name, stored.folder, stored.info
        self.config, self.raw_config = stored.config, stored.raw_config
        self._stored, self._scheme = stored, scheme
        text = stored.config.get_text_config(decoder=True)
        self._dtype = next(
            (dtype for config in (text, stored.config) if (dtype := _own_dtype(config)) in _PLAIN),
            torch.bfloat16,
        )
        names = set(stored.names())
        self._packed: dict[str, tuple[Layout, dict[str, str]]] = {}
        """Of each weight that is packed, the layout, and its tensors by what they are."""
        for name in names:
            for layout in scheme.layouts:
                if found := layout.find(name, names):
                    weight, parts = found
                    self._packed[weight] = layout, {"packed": name, **parts}
                    break
        used = {part for _, parts in self._packed.values() for part in parts.values()}
        plain = {name for name in names - used if not _OF_ACTIVATIONS.search(name)}
        if twice := sorted(plain & self._packed.keys()):
            raise CheckpointError(f"{self.name} has {twice[0]} twice, packed and plain")
        self._names = plain | self._packed.keys()
        self.stored_weights = (scheme.stored or scheme.method) if self._packed else None

    def names(self) -> Collection[str]:
        return self._names

    def nbytes(self, names: Collection[str]) -> int:
        return self._stored.nbytes(self._with_parts(names))

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        tensors = self._stored.read(self._with_parts(names), progress=progress)
        return {name: self._plain(name, tensors) for name in dict.fromkeys(names)}

    def stored_dtype(self) -> torch.dtype | None:
        return self._stored.stored_dtype()

    def _with_parts(self, names: Collection[str]) -> list[str]:
        packed = self._packed
        return [each for name in names for each in (packed[name][1].values() if name in packed else (name,))]

    def _plain(self, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if name not in self._packed:
            return tensors.pop(name)  # the loader refuses it if it is packed all the same
        layout, parts = self._packed[name]
        found = {kind: tensors[part] for kind, part in parts.items()}
        tensors.pop(parts["packed"])
        if found["packed"].dtype not in layout.dtypes:
            raise UnsupportedModelError(
                f"{self.name} is quantised ({self._scheme.method}), and {parts['packed']} has a scale and is "
                f"in {str(found['packed'].dtype).removeprefix('torch.')}; this is not understood"
            )
        try:
            return layout.unpack(**found).to(self._dtype)
        except (ValueError, RuntimeError, IndexError) as exc:  # torch's own, for shapes that do not fit
            raise CheckpointError(f"{name} of {self.name} cannot be dequantised: {exc}") from exc


def _own_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
