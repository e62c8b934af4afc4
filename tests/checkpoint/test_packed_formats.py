"""Checkpoints in the field's packed formats, as its own libraries write and read them.

Where no library of a format runs without a GPU, its words are made here number by number.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_random_model, tiny_config
from transformers import AutoModelForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import CheckpointError
from swarmcore.executor.base import TrainingBatch
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.loader import block_needs
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.1.mlp.down_proj.weight"
"""``[64, 96]``"""

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    model = save_random_model(tiny_config("llama"), folder)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def pack(
    stored: Path, folder: Path, settings: dict[str, Any], change: Callable[[torch.Tensor], Tensors]
) -> None:
    """The model with its projections replaced by what ``change`` gives, by the ends of their names."""
    folder.mkdir()
    tensors: Tensors = {}
    for name, data in load_file(stored / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            tensors |= {stem + end: part.contiguous() for end, part in change(data).items()}
        else:
            tensors[name] = data
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((stored / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))


def read(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.read(checkpoint.names())


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of ``numbers`` in words of 32 bits, the first in the lowest bits, without gaps."""
    rows = []
    for row in numbers.tolist():
        whole = sum(int(number) << (bits * place) for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        found = [(whole >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in found])
    return torch.tensor(rows, dtype=torch.int32)


def rounded(data: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales and zero points (1 or more) of groups."""
    grouped = data.view(len(data), -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 2)).half().float()
    zeros = (1 - low / scales).round().clamp(1, 2**bits - 1)
    numbers = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.view(data.shape), scales, zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["as it is", "by activations", "not said"])
def test_gptq(bits: int, version: str, order: str, stored: Path, tmp_path: Path) -> None:
    expected: list[torch.Tensor] = []
    less = version == "gptq"

    def change(data: torch.Tensor) -> Tensors:
        numbers, scales, zeros = rounded(data, bits, 32)
        index = torch.arange(data.shape[1]) // 32
        if order == "by activations":
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
        expected.append((numbers - zeros[:, index]) * scales[:, index])
        found = {
            "qweight": words(numbers, bits).t(),
            "qzeros": words(zeros.t() - int(less), bits),
            "scales": scales.t().half(),
        }
        return found | ({} if order == "not said" else {"g_idx": index.int()})

    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order == "by activations"}
    pack(stored, tmp_path / "packed", {**settings, "sym": False, "checkpoint_format": version}, change)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    found, plain = read(checkpoint), load_file(stored / "model.safetensors")
    assert found.keys() == plain.keys()
    projections = [name for name in plain if name.endswith("_proj.weight")]
    for name, values in zip(projections, expected, strict=True):
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
    kept = bits == 4 and order != "by activations"
    assert checkpoint.stored_weights == ("int4" if kept else "gptq")


def test_gptq_zero_points_that_it_cannot_hold(stored: Path, tmp_path: Path) -> None:
    def change(data: torch.Tensor) -> Tensors:
        numbers, scales, zeros = rounded(data, 4, 32)
        return {
            "qweight": words(numbers, 4).t(),
            "qzeros": words(torch.full_like(zeros.t(), 15), 4),
            "scales": scales.t().half(),
        }

    pack(stored, tmp_path / "packed", {"quant_method": "gptq", "bits": 4}, change)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight .*zero points"):
        open_checkpoint(str(tmp_path / "packed")).read([NAME])


def awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """Of eight neighbours the first, third, fifth, seventh in the low half of a word, the others above."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return words(numbers.view(len(numbers), -1, 8)[..., order].reshape(numbers.shape), 4)


def test_awq(stored: Path, tmp_path: Path) -> None:
    expected: list[torch.Tensor] = []

    def change(data: torch.Tensor) -> Tensors:
        numbers, scales, zeros = rounded(data, 4, 32)
        expected.append((numbers - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1))
        return {
            "qweight": awq_words(numbers.t()),
            "qzeros": awq_words(zeros.t()),
            "scales": scales.t().half(),
        }

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    pack(stored, tmp_path / "packed", settings, change)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    found = read(checkpoint)
    projections = [name for name in load_file(stored / "model.safetensors") if name.endswith("_proj.weight")]
    for name, values in zip(projections, expected, strict=True):
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
    assert checkpoint.stored_weights == "int4"


COMPRESSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}, "int4"),
    "int4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False},
        "int4",
    ),
    "int3 rows": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, "compressed-tensors"),
    "int8 rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, "int8"),
    "int8 plain": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "int8"),
    "fp8 rows": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        "compressed-tensors",
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
        "compressed-tensors",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"},
        "compressed-tensors",
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "group_size": 32, "strategy": "group"},
        "compressed-tensors",
    ),
}


def compress(data: torch.Tensor, form: str, scheme: Any) -> Tensors:
    """By the library's own compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = scheme.weights
    groups = data.view(len(data), -1, arguments.group_size if arguments.group_size else data.shape[1])
    whole = {"weight_global_scale": (448 * 6 / data.abs().max()).reshape(1)} if "nvfp4" in form else {}
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), arguments, global_scale=whole.get("weight_global_scale")
    )
    state = {"weight": data, "weight_scale": scale, "weight_zero_point": zero, **whole}
    found: Tensors = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    return found


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind: str, stored: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from transformers import CompressedTensorsConfig

    form, arguments, kept = COMPRESSED[kind]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments)
    )
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    pack(stored, tmp_path / "packed", settings, lambda data: compress(data, form, scheme))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    )
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    assert checkpoint.stored_weights == kept
    expected = model.state_dict()
    found = read(checkpoint)
    assert found.keys() == expected.keys()
    for name, data in found.items():
        # The library dequantises nvfp4 in bfloat16.
        torch.testing.assert_close(data, expected[name], rtol=0.008 if kind == "nvfp4" else 1e-6, atol=1e-7)
    if kind.startswith("int"):
        ids = torch.randint(3, 128, (7,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        assert_close_logits(asyncio.run(logits_of(checkpoint, ids)), logits)


async def logits_of(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Through a server of all blocks, with the weights that it takes of itself, and a client's own parts."""
    executor = TorchExecutor.load(checkpoint, checkpoint.info.span, threads=1)
    stored = checkpoint.stored_weights
    assert executor.numerics.weights == (stored if stored in ("int8", "int4") else "f32")
    parts = LocalParts.load(checkpoint)
    hidden = parts.embed(ids.tolist(), range(len(ids)))
    batch = TrainingBatch(executor.span, (len(ids),), to_wire("hidden", hidden))
    forward = executor.forward(batch)
    while not await forward.advance(100):
        pass
    await executor.close()
    return parts.logits(to_torch(forward.outputs))


def assert_close_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits(kind: str, nested: bool, stored: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    expected: list[torch.Tensor] = []

    def change(data: torch.Tensor) -> Tensors:
        # In rows of one block: its kernel for CPUs is wrong where blocks go on in the next row.
        rows = data.reshape(-1, 64)
        packed, state = functional.quantize_4bit(rows, quant_type=kind, compress_statistics=nested)
        expected.append(functional.dequantize_4bit(packed, state).view(data.shape))
        state.shape = data.shape
        return {"weight": packed} | {
            f"weight.{name}": part for name, part in state.as_dict(packed=True).items()
        }

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    pack(stored, tmp_path / "packed", settings, change)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    found = read(checkpoint)
    projections = [name for name in load_file(stored / "model.safetensors") if name.endswith("_proj.weight")]
    for name, values in zip(projections, expected, strict=True):
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
    assert checkpoint.stored_weights == ("nf4" if kind == "nf4" else "bitsandbytes")


def test_mxfp4_of_experts(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = tiny_config("gpt_oss")
    save_random_model(config, tmp_path)
    expected: Tensors = {}
    tensors: Tensors = {}
    for file in tmp_path.glob("model*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
    checkpoint = open_checkpoint(str(tmp_path))
    found = checkpoint.read(expected.keys())
    assert len(expected) == 10
    for name, values in expected.items():
        assert torch.equal(found[name], values)
    from transformers import Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    ids = torch.randint(3, 128, (7,), generator=generator)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    assert_close_logits(asyncio.run(logits_of(checkpoint, ids)), logits)


def test_fp8_in_blocks(stored: Path, tmp_path: Path) -> None:
    """As transformers writes it, and dequantises it where there is no GPU for it."""

    def change(data: torch.Tensor) -> Tensors:
        blocks = data.view(data.shape[0] // 32, 32, data.shape[1] // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(data.shape)
        return {"weight": values, "weight_scale_inv": scale}

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    pack(stored, tmp_path / "packed", settings, change)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    for name, data in read(checkpoint).items():
        torch.testing.assert_close(data, model.state_dict()[name].float(), rtol=1e-6, atol=1e-7)
    ids = torch.randint(3, 128, (7,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    assert_close_logits(asyncio.run(logits_of(checkpoint, ids)), logits)


def test_modelopts_nvfp4(stored: Path, tmp_path: Path) -> None:
    expected: list[torch.Tensor] = []
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    generator = torch.Generator().manual_seed(0)

    def change(data: torch.Tensor) -> Tensors:
        rows, columns = data.shape
        numbers = torch.randint(0, 16, data.shape, generator=generator)
        scale = (torch.rand(rows, columns // 16, generator=generator) + 0.1).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.03)
        expected.append(table[numbers] * scale.float().repeat_interleave(16, 1) * whole)
        pairs = numbers.view(rows, -1, 2)
        return {
            "weight": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8),
            "weight_scale": scale,
            "weight_scale_2": whole,
            "input_scale": torch.ones(()),
        }

    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    pack(stored, tmp_path / "packed", settings, change)
    found = read(open_checkpoint(str(tmp_path / "packed")))
    plain = load_file(stored / "model.safetensors")
    assert found.keys() == plain.keys()
    projections = [name for name in plain if name.endswith("_proj.weight")]
    for name, values in zip(projections, expected, strict=True):
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


def test_one_fingerprint_whatever_weights_are_asked_for(stored: Path, tmp_path: Path) -> None:
    """And blocks that are kept as they are stored are planned for as such."""

    def change(data: torch.Tensor) -> Tensors:
        numbers, scales, zeros = rounded(data, 4, 32)
        return {
            "qweight": awq_words(numbers.t()),
            "qzeros": awq_words(zeros.t()),
            "scales": scales.t().half(),
        }

    pack(stored, tmp_path / "packed", {"quant_method": "awq", "bits": 4, "group_size": 32}, change)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    needs = {}
    for weights in ("auto", "int8", "bf16"):
        again = open_checkpoint(str(tmp_path / "packed"))
        assert again.info == checkpoint.info
        needs[weights] = block_needs(again, dtype="auto", weights=weights, device="cpu", batch_tokens=8)
    assert needs["auto"].weights < needs["int8"].weights < needs["bf16"].weights
    executor = TorchExecutor.load(checkpoint, checkpoint.info.span, weights="int8", threads=1)
    assert executor.model.fingerprint == checkpoint.info.fingerprint
    assert str(executor.numerics) == "torch/int8/f32"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("qzeros", lambda data: data[:-1]),
        ("scales", lambda data: data[:, :-8]),
        ("qweight", lambda data: data[:, :-1]),
    ],
)
def test_parts_that_do_not_fit(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], stored: Path, tmp_path: Path
) -> None:
    def packed(data: torch.Tensor) -> Tensors:
        numbers, scales, zeros = rounded(data, 4, 32)
        parts = {
            "qweight": awq_words(numbers.t()),
            "qzeros": awq_words(zeros.t()),
            "scales": scales.t().half(),
        }
        return parts | {part: change(parts[part])}

    pack(stored, tmp_path / "packed", {"quant_method": "awq", "bits": 4}, packed)
    with pytest.raises(CheckpointError, match=re.escape(f"{NAME} of packed cannot be dequantised")):
        open_checkpoint(str(tmp_path / "packed")).read([NAME])
