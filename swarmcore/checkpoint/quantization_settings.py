"""What tools write of how they have quantised a model, and what follows for reading its weights.

A setting that is not known may change what weights mean, so it is an error, as are methods and layouts that
are not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from swarmcore.checkpoint import packed_formats
from swarmcore.checkpoint.base import read_json
from swarmcore.checkpoint.packed_formats import FLOAT8, Layout
from swarmcore.errors import UnsupportedModelError
from swarmcore.types import JsonDict

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
_USUAL_BLOCK = (128, 128)


@attrs.frozen
class Scheme:
    """How a checkpoint's packed weights become plain ones."""

    method: str
    layouts: tuple[Layout, ...]
    """In which its weights may be stored; the first that fits a name is taken."""
    stored: str | None = None
    """What executors have the same as, such as ``"int4"``; None where they have nothing like it."""


def find_settings(raw: JsonDict, folder: Path) -> list[tuple[str, Any]]:
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


def scheme_of(name: str, where: str, settings: Any) -> Scheme:
    """How to undo what ``settings`` say, or `UnsupportedModelError`."""
    if not isinstance(settings, dict):
        raise _refused(name, f"an unknown method, {json.dumps(settings)[:60]}", where)
    method = _method(settings, where)
    if method not in _METHODS:
        raise _refused(name, f"{method} {settings.get('quant_algo', '')}".strip(), where)
    known, make = _METHODS[method]
    if unknown := sorted(_given(settings) - known - _ALWAYS_KNOWN):
        raise _refused(name, f"{method}, with {unknown[0]}, which is not known", where)
    scheme = make(settings)
    if isinstance(scheme, str):
        raise _refused(name, f"{method}, {scheme}" if scheme else method, where)
    return scheme


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


def _fp8(settings: JsonDict) -> Scheme | str:
    if (kind := settings.get("fmt", "e4m3")) not in ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"):
        return f"fmt {kind}"
    if (kind := settings.get("scale_fmt")) not in (None, "ue8m0", "float", "float32"):
        return f"scale_fmt {kind}"
    block = settings.get("weight_block_size")
    sizes = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else _USUAL_BLOCK
    layout = packed_formats.scaled(FLOAT8 | {torch.int8}, block=sizes, four_bits=True)
    return Scheme("fp8", (layout,))


def _modelopt(settings: JsonDict) -> Scheme | str:
    algorithm = str(settings.get("quant_algo", ""))
    scale = packed_formats.scaled(FLOAT8, scales=("_scale",), block=_USUAL_BLOCK)
    nvfp4 = packed_formats.fp4_packed("weight", inner="weight_scale_2")
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        return Scheme("modelopt", (scale,))
    if algorithm in ("NVFP4", "MIXED_PRECISION"):
        return Scheme("modelopt", (nvfp4, scale))
    return algorithm


def _bitsandbytes(settings: JsonDict) -> Scheme | str:
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        return Scheme(
            "bitsandbytes", (packed_formats.BITSANDBYTES_4BIT,), stored="nf4" if kind == "nf4" else None
        )
    if settings.get("load_in_8bit"):
        return Scheme("bitsandbytes", (packed_formats.LLM_INT8,), stored="int8")
    return "in neither 4 nor 8 bits"


def _gptq(settings: JsonDict) -> Scheme | str:
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        return f"the layout {version}"
    if settings.get("is_marlin_format"):
        return "the layout marlin"
    if (words := settings.get("pack_dtype", "int32")) != "int32":
        return f"pack_dtype {words}"
    in_order = not settings.get("desc_act") and _fits_int4(settings.get("group_size", -1))
    layout = packed_formats.gptq(zeros_less_one=version == "gptq")
    return Scheme("gptq", (layout,), stored="int4" if settings.get("bits") == 4 and in_order else None)


def _awq(settings: JsonDict) -> Scheme | str:
    if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4:
        return f"{bits} bits"
    if (version := str(settings.get("version") or settings.get("format") or "gemm").lower()) != "gemm":
        return f"the layout {version}"
    group = settings.get("group_size", settings.get("q_group_size", 128))
    return Scheme("awq", (packed_formats.AWQ,), stored="int4" if _fits_int4(group) else None)


def _mxfp4(settings: JsonDict) -> Scheme:
    return Scheme("mxfp4", (packed_formats.MXFP4,))


def _fits_int4(group: Any) -> bool:
    return isinstance(group, int) and (group == -1 or group % 32 == 0)


def _compressed_tensors(settings: JsonDict) -> Scheme | str:
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        return "config_groups of another kind"
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"sparsity {sparsity['format']}"
    if settings.get("transform_config"):
        return "transform_config"
    own = settings.get("format")
    weights = [
        (str(group.get("format") or own), group["weights"])
        for group in groups.values()
        if group.get("weights")
    ]
    packed = (arguments for form, arguments in weights if form == "pack-quantized")
    widths = frozenset(arguments.get("num_bits", 8) for arguments in packed)
    layouts: dict[str, tuple[Any, Layout]] = {}
    for form, arguments in weights or [(str(own), {})]:
        if unknown := sorted(_given(arguments) - _WEIGHT_ARGUMENTS):
            return f"with {unknown[0]}, which is not known"
        # Static orders have changed how weights were rounded, not how they are stored.
        if (order := arguments.get("actorder")) not in (None, False, "weight", "static"):
            return f"actorder {order}"
        made = _compressed_layout(form, arguments, widths)
        if isinstance(made, str):
            return made
        how, layout = made
        if layouts.setdefault(layout.packed + form, (how, layout))[0] != how:
            return f"groups of {form} that differ"
    return Scheme(
        "compressed-tensors", tuple(layout for _, layout in layouts.values()), stored=_compressed_as(weights)
    )


def _compressed_layout(form: str, weights: JsonDict, widths: frozenset[int]) -> tuple[Any, Layout] | str:
    """With what in the settings it depends on; or what is not understood."""
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if form in ("float-quantized", "int-quantized", "naive-quantized", "dense", "None"):
        if bits != 8:
            return f"{bits} bits"
        block: tuple[int | None, int] | None = None
        structure, size = weights.get("block_structure"), weights.get("group_size")
        if isinstance(structure, list) and len(structure) == 2:
            block = int(structure[0]), int(structure[1])
        elif isinstance(size, int) and size > 0:
            block = None, size
        kinds = FLOAT8 | {torch.int8}
        return block, packed_formats.scaled(kinds, scales=("_scale",), block=block, zero_points=True)
    if form == "pack-quantized" and kind == "int" and widths <= set(range(1, 9)):
        return None, packed_formats.pack_quantized(widths)
    if form == "nvfp4-pack-quantized":
        return None, packed_formats.fp4_packed("weight_packed", inner="weight_global_scale", multiplied=False)
    if form == "mxfp4-pack-quantized":
        return None, packed_formats.fp4_packed("weight_packed")
    if form == "mxfp8-quantized":
        return None, packed_formats.scaled(FLOAT8, scales=("_scale",), block=(None, 32))
    return form


def _compressed_as(weights: list[tuple[str, JsonDict]]) -> str | None:
    kinds: set[str | None] = set()
    for form, arguments in weights:
        group, bits = arguments.get("group_size"), arguments.get("num_bits", 8)
        if form == "pack-quantized" and bits == 4 and _fits_int4(-1 if group is None else group):
            kinds.add("int4")
        elif arguments.get("strategy") == "channel" and bits == 8 and arguments.get("type", "int") == "int":
            kinds.add("int8" if arguments.get("symmetric", True) else None)
        else:
            kinds.add(None)
    return kinds.pop() if len(kinds) == 1 else None


def _given(settings: JsonDict) -> set[str]:
    return {key for key, value in settings.items() if value is not None}


_ALWAYS_KNOWN = frozenset(
    {"quant_method", "modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize", "meta"}
)
"""Which weights are packed is seen from what there is of them."""
_WEIGHT_ARGUMENTS = frozenset(
    {
        "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
        "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
    }
)  # fmt: skip
_METHODS: dict[str, tuple[frozenset[str], Callable[[JsonDict], Scheme | str]]] = {
    "fp8": (
        frozenset({"activation_scheme", "weight_block_size", "fmt", "scale_fmt", "kv_cache_scheme"}),
        _fp8,
    ),
    "fbgemm_fp8": (frozenset({"activation_scale_ub"}), _fp8),
    "modelopt": (
        frozenset(
            {
                "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size", "exclude_modules",
                "ignore", "producer", "config_groups", "quantized_layers",
            }
        ),
        _modelopt,
    ),
    "compressed-tensors": (
        frozenset(
            {
                "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status",
                "global_compression_ratio", "sparsity_config", "transform_config", "version",
                "run_compressed",
            }
        ),
        _compressed_tensors,
    ),
    "bitsandbytes": (
        frozenset(
            {
                "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold",
                "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
                "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
                "bnb_4bit_quant_storage",
            }
        ),
        _bitsandbytes,
    ),
    "gptq": (
        frozenset(
            {
                "bits", "group_size", "desc_act", "sym", "format", "checkpoint_format", "pack_dtype",
                "is_marlin_format", "lm_head", "dynamic", "damp_percent", "damp_auto_increment",
                "act_group_aware", "static_groups", "true_sequential", "mse", "model_name_or_path",
                "model_file_base_name", "quantizer", "tokenizer", "dataset", "backend", "use_exllama",
                "disable_exllama", "exllama_config", "max_input_length", "use_cuda_fp16", "model_seqlen",
                "block_name_to_quantize", "module_name_preceding_first_block", "batch_size",
                "pad_token_id", "cache_block_outputs", "modules_in_block_to_quantize", "version",
            }
        ),
        _gptq,
    ),
    "awq": (
        frozenset(
            {
                "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "backend",
                "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
            }
        ),
        _awq,
    ),
    "mxfp4": (frozenset(), _mxfp4),
}  # fmt: skip
"""By the name of a method, the settings that it may have, and what is made of them: a scheme, or what in
them is not understood."""
