"""Quantised checkpoints: dequantised as they are read where a plain product does it, else refused by name.

A weight in 8 bits means nothing without its scale, and a loader that knows neither takes it for what it
would mean in 16. So what says that weights are quantised is looked for everywhere it has been put, and a
tensor in fewer than 16 bits that nothing explains is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from swarmcore.checkpoint.base import Checkpoint, read_json
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.types import JsonDict, Progress

QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "auto-round",
    "quanto_qmap.json": "quanto",
}
"""Files beside config.json in which tools say that weights are quantised, and which tool that is."""

_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|video|speech|encoder")
_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_USUAL_BLOCK = (128, 128)
_OF_ACTIVATIONS = re.compile(
    r"(^|\.)(activation_scale|input_scale|input_scale_ub|output_scale|[qkv]_scale|[kv]_zero_point"
    r"|input_zero_point|output_zero_point)$"
)
"""Scales of what a layer takes and gives: without rounding activations, they cancel out."""
_PLAIN = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_PACKED_NAME = re.compile(
    r"(scale(_inv|_2)?|scales|SCB|qweight|qzeros|g_idx|absmax|quant_map|quant_state\..+|weight_packed"
    r"|zero_point|zeros|blocks|codes|codebooks|weight_format)$"
)


@attrs.frozen
class Scheme:
    """How packed weights become plain ones: ``(weight - zero point) * scale``."""

    method: str
    dtypes: frozenset[torch.dtype]
    """What packed weights are kept in."""
    scales: tuple[str, ...] = ("_scale", "_scale_inv")
    """What a weight's name is followed by in that of its scale."""
    block: tuple[int | None, int] | None = None
    """Rows and columns that share a scale, where the settings say."""
    zero_points: bool = False
    bitsandbytes: bool = False


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with plain tensors: itself when nothing in its settings says that it is quantised.

    Raise `UnsupportedModelError` for a quantisation that is not undone here.
    """
    found = _settings(checkpoint.raw_config, checkpoint.folder)
    if not found:
        return checkpoint
    schemes = {_scheme(checkpoint.name, where, settings) for where, settings in found}
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
        self._parts = {name: parts for name in names if (parts := _parts(name, names, scheme))}
        """What belongs to a packed weight: its scale, its zero point."""
        hidden = {part for parts in self._parts.values() for part in parts.values()}
        self._names = {name for name in names - hidden if not _OF_ACTIVATIONS.search(name)}

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
        return [each for name in names for each in (name, *self._parts.get(name, {}).values())]

    def _plain(self, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        data, parts = tensors.pop(name), self._parts.get(name)
        if parts is None:
            return data  # the loader refuses it if it is packed all the same
        if data.dtype not in self._scheme.dtypes:
            raise UnsupportedModelError(
                f"{self.name} is quantised ({self._scheme.method}), and {name} has a scale and is in "
                f"{str(data.dtype).removeprefix('torch.')}; this is not understood"
            )
        found = {kind: tensors[part] for kind, part in parts.items()}
        try:
            return dequantize(data, self._scheme, **found).to(self._dtype)
        except ValueError as exc:
            raise CheckpointError(f"{name} of {self.name} cannot be dequantised: {exc}") from exc


def dequantize(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain weight, in float32. Raise `ValueError` when the shapes do not fit each other.

    ``scale`` has one value for all, for each row, or for each block of rows and columns. ``layout`` is how
    bitsandbytes says that it has not reordered an 8-bit weight (0).
    """
    if layout is not None and bool(layout.ne(0).any()):
        raise ValueError("bitsandbytes has stored it in the order of a kernel, not by rows")
    if not scale.dtype.is_floating_point:
        raise ValueError(f"its scale is in {scale.dtype}")
    values = weight.float()
    if zero_point is not None:
        values = values - _spread(zero_point.float(), weight.shape, scheme.block)
    scales = scale.float() / 127 if scheme.bitsandbytes else scale.float()
    return values * _spread(scales, weight.shape, scheme.block)


def _spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int | None, int] | None) -> torch.Tensor:
    """``scale``, so that it can be multiplied with a weight of ``shape``."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(shape) > 1 and scale.shape[0] == shape[0]:
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.dim() != len(shape):
        raise ValueError(f"a scale of shape {list(scale.shape)} does not fit one of {list(shape)}")
    sizes = (None,) * (len(shape) - 2) + (block or (None, None))
    for dim, (rows, groups, size) in enumerate(zip(shape, scale.shape, sizes[-len(shape) :], strict=True)):
        if groups in (1, rows):
            continue
        if not size or -(-rows // size) != groups:
            raise ValueError(f"a scale of shape {list(scale.shape)} does not fit one of {list(shape)}")
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, rows)
    return scale


def _parts(name: str, names: set[str], scheme: Scheme) -> dict[str, str] | None:
    if scheme.bitsandbytes:
        if not name.endswith(".weight") or (scale := name.removesuffix("weight") + "SCB") not in names:
            return None
        layout = name.removesuffix("weight") + "weight_format"
        return {"scale": scale} | ({"layout": layout} if layout in names else {})
    scale = next((name + suffix for suffix in scheme.scales if name + suffix in names), "")
    if not scale:
        return None
    zero = name + "_zero_point"
    return {"scale": scale} | ({"zero_point": zero} if scheme.zero_points and zero in names else {})


def _settings(raw: JsonDict, folder: Path) -> list[tuple[str, Any]]:
    """Where it says that weights are quantised, and what it says there."""
    if found := list(_in_config(raw, "config.json")):
        return found
    there = ((file, tool) for file, tool in QUANTIZATION_FILES.items() if (folder / file).is_file())
    found = []
    for file, tool in there:
        settings = read_json(folder / file)
        inner = settings.get("quantization") if tool == "modelopt" else None
        found.append((file, {"quant_method": tool, **(inner if isinstance(inner, dict) else settings)}))
    return found


def _in_config(raw: JsonDict, path: str) -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if key in _KEYS:
            if value:
                yield f"{path} ({key})", value
        elif isinstance(value, dict) and not _OTHER_TOWER.search(key):
            yield from _in_config(value, f"{path} in {key}")


def _scheme(name: str, where: str, settings: Any) -> Scheme:
    """How to undo what ``settings`` say, or `UnsupportedModelError`."""
    if not isinstance(settings, dict):
        raise _refused(name, f"an unknown method, {json.dumps(settings)[:60]}", where)
    method = _method(settings, where)
    block = settings.get("weight_block_size")
    sizes = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else _USUAL_BLOCK
    algorithm = str(settings.get("quant_algo", ""))
    if method in ("fp8", "fbgemm_fp8"):
        return Scheme(method, _FLOAT8, block=sizes)
    if method == "modelopt" and algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        return Scheme(method, _FLOAT8, scales=("_scale",), block=_USUAL_BLOCK)
    if method == "compressed-tensors" and (reason := _not_plainly_compressed(settings)) is None:
        return Scheme(
            method, _FLOAT8 | {torch.int8}, scales=("_scale",), block=_block(settings), zero_points=True
        )
    if method == "compressed-tensors":
        raise _refused(name, f"compressed-tensors, {reason}", where)
    if method == "bitsandbytes" and settings.get("load_in_8bit") and not settings.get("load_in_4bit"):
        return Scheme(method, frozenset({torch.int8}), bitsandbytes=True)
    raise _refused(name, f"{method} {algorithm}".strip(), where)


def _method(settings: JsonDict, where: str) -> str:
    if method := settings.get("quant_method"):
        return str(method).lower()
    if "load_in_8bit" in settings or "load_in_4bit" in settings:
        return "bitsandbytes"
    if "compression_config" in where:
        return "compressed-tensors"
    if "bits" in settings and "group_size" in settings:
        return "MLX or GPTQ"
    return "an unknown method"


def _refused(name: str, method: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights of {name} are quantised ({method}), says {where}; "
        f"use its bfloat16, float16 or float32 checkpoint"
    )


def _not_plainly_compressed(settings: JsonDict) -> str | None:
    """Why what compressed-tensors has written is more than weights with scales; None when it is not."""
    groups = settings.get("config_groups") or {}
    groups = (
        [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    )
    formats = {settings.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}
    if other := sorted(formats - {"float-quantized", "int-quantized", "naive-quantized", "dense"}):
        return str(other[0])
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"sparsity {sparsity['format']}"
    if settings.get("transform_config"):
        return "transform_config"
    for weights in (group.get("weights") or {} for group in groups):
        if weights.get("num_bits", 8) != 8:
            return f"{weights['num_bits']} bits"
        if weights.get("actorder"):
            return f"actorder {weights['actorder']}"
    return None


def _block(settings: JsonDict) -> tuple[int | None, int] | None:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = (group or {}).get("weights") or {}
        structure, size = weights.get("block_structure"), weights.get("group_size")
        if isinstance(structure, list) and len(structure) == 2:
            return int(structure[0]), int(structure[1])
        if isinstance(size, int) and size > 0:
            return None, size
    return None


def _own_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
