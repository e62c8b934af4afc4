"""Quantised checkpoints: the right weights or a refusal that names the method, on both sides of a swarm."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.packed_formats import scaled
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.executor.loader import LoadSettings
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.loader import TorchLoader
from swarmcore.types import Span

FP8 = frozenset({torch.float8_e4m3fn})
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_random_model(tiny_config("llama"), folder)
    whole = {name: data for file in folder.glob("*.safetensors") for name, data in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def model(plain_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_model, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[str, torch.Tensor], Tensors]) -> None:
    """Replace every tensor of the blocks' projections by what ``change`` makes of it."""
    tensors = load_file(folder / "model.safetensors")
    packed: Tensors = {}
    for name, data in tensors.items():
        packed |= change(name, data) if name.endswith("_proj.weight") else {name: data}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})


def say(folder: Path, **settings: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | settings))


def by_tensor(suffix: str) -> Callable[[str, torch.Tensor], Tensors]:
    def change(name: str, data: torch.Tensor) -> Tensors:
        scale = data.abs().max() / 448
        return {name: (data / scale).to(torch.float8_e4m3fn), name + suffix: scale.reshape(1)} | {
            name.replace("weight", "input_scale"): torch.ones(1)
        }

    return change


def by_row(kind: torch.dtype, limit: float) -> Callable[[str, torch.Tensor], Tensors]:
    def change(name: str, data: torch.Tensor) -> Tensors:
        scale = data.abs().amax(1, keepdim=True) / limit
        values = data / scale
        return {name: (values.round() if kind == torch.int8 else values).to(kind), name + "_scale": scale}

    return change


def by_block(name: str, data: torch.Tensor) -> Tensors:
    scale = torch.rand(-(-data.shape[0] // 48), -(-data.shape[1] // 48)) + 0.5
    return {name: data.to(torch.float8_e4m3fn), name + "_scale_inv": scale}


def by_zero_point(name: str, data: torch.Tensor) -> Tensors:
    found = by_row(torch.int8, 100)(name, data)
    return found | {name + "_zero_point": torch.full_like(found[name + "_scale"], 3, dtype=torch.int8)}


def bitsandbytes(name: str, data: torch.Tensor) -> Tensors:
    largest = data.abs().amax(1)
    base = name.removesuffix("weight")
    return {
        name: (data / largest[:, None] * 127).round().to(torch.int8),
        f"{base}SCB": largest,
        f"{base}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


BLOCKS_48 = {"quant_method": "fp8", "weight_block_size": [48, 48]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
LOADED: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Tensors], float]] = {
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, by_tensor("_scale_inv"), 0.08),
    "fp8 blocks": ({"quantization_config": BLOCKS_48}, by_block, 0.0),
    "fbgemm": (
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        by_row(torch.float8_e4m3fn, 448),
        0.08,
    ),
    "compressed-tensors": ({"quantization_config": COMPRESSED}, by_tensor("_scale"), 0.08),
    "an old key": ({"compression_config": {"format": "float-quantized"}}, by_tensor("_scale"), 0.08),
    "int8 by row": (
        {"quantization_config": COMPRESSED | {"format": "int-quantized"}},
        by_row(torch.int8, 127),
        0.02,
    ),
    "int8, zero points": (
        {"quantization_config": COMPRESSED | {"format": "int-quantized"}},
        by_zero_point,
        0.1,
    ),
    "nested": ({"llm_settings": {"quantization_config": {"quant_method": "fp8"}}}, by_tensor("_scale"), 0.08),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        bitsandbytes,
        0.02,
    ),
}


@pytest.mark.parametrize("kind", LOADED)
def test_weights_are_dequantised_as_they_are_read(kind: str, model: Path, plain_model: Path) -> None:
    settings, change, off = LOADED[kind]
    edit(model, change)
    say(model, **settings)
    stored = load_file(model / "model.safetensors")
    checkpoint, plain = open_checkpoint(str(model)), open_checkpoint(str(plain_model))
    assert set(checkpoint.names()) == set(plain.names()), "no scale is among them"
    expected, found = plain.read(plain.names()), checkpoint.read(checkpoint.names())
    for name, data in found.items():
        assert data.dtype == torch.float32, "the dtype that the config names"
        if kind == "fp8 blocks" and name in stored and stored[name].dtype == torch.float8_e4m3fn:
            rows, columns = (torch.arange(size) // 48 for size in data.shape)
            scale = stored[name + "_scale_inv"][rows][:, columns]
            assert torch.equal(data, stored[name].float() * scale)
        elif kind == "int8, zero points" and name.endswith("_proj.weight"):
            expected_data = (stored[name].float() - 3) * stored[name + "_scale"]
            assert torch.equal(data, expected_data)
        else:
            torch.testing.assert_close(data, expected[name], rtol=off, atol=off * 0.1)
    TorchExecutor.load(checkpoint, Span(1, 3))
    LocalParts.load(checkpoint)


def test_a_server_says_that_packed_weights_become_plain(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, change, _ = LOADED["fp8"]
    edit(model, change)
    say(model, **settings)
    for weights, said in (("auto", True), ("int8", False), ("bf16", False)):
        caplog.clear()
        TorchLoader(LoadSettings(model=str(model), weights=weights)).load(Span(1, 2))
        assert ("has its weights in fp8, for which torch has no kernel here" in caplog.text) == said


FORMATS = {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}
REFUSED: dict[str, dict[str, Any]] = {
    "gptq, the layout marlin": {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    },
    "gptq, with hadamard": {"quantization_config": {"quant_method": "gptq", "bits": 4, "hadamard": True}},
    "awq, the layout gemv": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}},
    "awq, 3 bits": {"quantization_config": {"quant_method": "awq", "bits": 3}},
    "fp8, fmt e3m4": {"quantization_config": {"quant_method": "fp8", "fmt": "e3m4"}},
    "hqq": {"quantization_config": {"quant_method": "hqq"}},
    "eetq": {"quantization_config": {"quant_method": "eetq"}},
    "quanto": {"quantization_config": {"quant_method": "quanto", "weights": "int8"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "auto-round": {"quantization_config": {"quant_method": "auto-round"}},
    "bitnet": {"quantization_config": {"quant_method": "bitnet"}},
    "modelopt, W4A8_AWQ": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}},
    "marlin-24": {"quantization_config": {**COMPRESSED, "format": "marlin-24"}},
    "sparse-24-bitmask": {
        "quantization_config": {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}
    },
    "4 bits": {"compression_config": {**COMPRESSED, **FORMATS}},
    "actorder group": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 4, "actorder": "group"}}},
        }
    },
    "with rotation": {
        "quantization_config": {**COMPRESSED, "config_groups": {"g": {"weights": {"rotation": 1}}}}
    },
    "transform_config": {"quantization_config": {**COMPRESSED, "transform_config": {"r": 1}}},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}},
    "new method": {"llm_settings": {"language": {"quantization_config": {"quant_method": "new method"}}}},
}


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_refused_by_name(method: str, model: Path) -> None:
    say(model, **REFUSED[method])
    with pytest.raises(UnsupportedModelError, match=rf"quantised \(.*{method}.*config\.json"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A8_AWQ"}}, "modelopt, W4A8_AWQ"),
        ("quantize_config.json", {"bits": 4, "pack_dtype": "int16"}, "gptq, pack_dtype int16"),
        ("quant_config.json", {"w_bit": 3}, "awq, 3 bits"),
        ("quanto_qmap.json", {"model.layers.0": {"weights": "qint8"}}, "quanto"),
    ],
)
def test_files_beside_the_config(model: Path, file: str, content: dict[str, Any], words: str) -> None:
    (model / file).write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=rf"{words}\), says {re.escape(file)}"):
        open_checkpoint(str(model))


def test_modelopts_own_file(model: Path, plain_model: Path) -> None:
    edit(model, by_tensor("_scale"))
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    name = "model.layers.2.mlp.up_proj.weight"
    expected = open_checkpoint(str(plain_model)).read([name])[name]
    torch.testing.assert_close(open_checkpoint(str(model)).read([name])[name], expected, rtol=0.08, atol=0.01)


def test_settings_of_an_image_tower_alone(model: Path) -> None:
    say(model, vision_config={"quantization_config": {"quant_method": "gptq"}})
    open_checkpoint(str(model))


def test_two_methods_at_once(model: Path) -> None:
    fp8, bnb = {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}
    say(model, quantization_config=fp8, llm_settings={"quantization_config": bnb})
    with pytest.raises(UnsupportedModelError, match="several places"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "int8"), (torch.uint8, "uint8")],
)
def test_packed_tensors_that_nothing_explains(model: Path, dtype: torch.dtype, word: str) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.mlp\.up_proj\.weight \({word}\)"):
        TorchExecutor.load(checkpoint, Span(0, 2))
    with pytest.raises(UnsupportedModelError, match=rf"lm_head\.weight \({word}\)"):
        LocalParts.load(checkpoint)
    TorchExecutor.load(checkpoint, Span(2, 3))


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale", ".absmax", "_lora_a"])
def test_tensors_that_the_model_has_no_place_for(model: Path, suffix: str) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        tensors[name + suffix] = torch.ones(1)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(UnsupportedModelError, match=re.escape(f"up_proj.weight{suffix}")):
        TorchExecutor.load(checkpoint, Span(0, 2))
    with pytest.raises(UnsupportedModelError, match=re.escape(f"lm_head.weight{suffix}")):
        LocalParts.load(checkpoint)


def test_tensors_that_models_compute_themselves_are_no_fault(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.1.self_attn.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.uint8)
    tensors["model.layers.1.self_attn.masked_bias"] = torch.ones(())
    tensors["score.weight"] = torch.ones(2, 64)
    tensors["mtp.fc.weight"] = torch.ones(2, 64, dtype=torch.int8)
    tensors["model.layers.5.eh_proj.weight"] = torch.ones(2, 64, dtype=torch.int8)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(model))
    TorchExecutor.load(checkpoint, Span(0, 2))
    LocalParts.load(checkpoint)


def test_a_scale_beside_a_plain_weight(model: Path) -> None:
    edit(model, lambda name, data: {name: data, name + "_scale": torch.ones(1)})
    say(model, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="has a scale and is in float32"):
        TorchExecutor.load(open_checkpoint(str(model)), Span(0, 1))


def test_bitsandbytes_in_the_order_of_a_kernel(model: Path) -> None:
    def change(name: str, data: torch.Tensor) -> Tensors:
        found = bitsandbytes(name, data)
        return {key: data + 1 if key.endswith("weight_format") else data for key, data in found.items()}

    edit(model, change)
    say(model, quantization_config={"load_in_8bit": True})
    with pytest.raises(CheckpointError, match="order of a kernel"):
        TorchExecutor.load(open_checkpoint(str(model)), Span(0, 1))


@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (torch.tensor(2.0), torch.full((4, 6), 2.0)),
        (torch.tensor([[3.0]]), torch.full((4, 6), 3.0)),
        (torch.arange(4.0), torch.arange(4.0)[:, None].expand(4, 6)),
        (torch.arange(6.0)[None], torch.arange(6.0)[None].expand(4, 6)),
    ],
)
def test_scales_of_every_shape(scale: torch.Tensor, spread: torch.Tensor) -> None:
    weight = torch.randn(4, 6).to(torch.float8_e4m3fn)
    assert torch.equal(scaled(FP8).unpack(weight, scale=scale), weight.float() * spread)


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize("columns", [6, 5])
def test_scales_of_blocks(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = scale.kron(torch.ones(2, 3))[:rows, :columns]
    of_blocks = scaled(FP8, block=(2, 3))
    assert torch.equal(of_blocks.unpack(weight, scale=scale), weight.float() * spread)
    with pytest.raises(ValueError, match="does not fit"):  # nobody says how large its blocks are
        scaled(FP8).unpack(weight, scale=scale)


def test_scales_of_groups_of_columns() -> None:
    weight = torch.randn(4, 6).to(torch.float8_e4m3fn)
    scale = torch.rand(4, 3)
    of_groups = scaled(FP8, block=(None, 2))
    spread = scale.repeat_interleave(2, 1)
    assert torch.equal(of_groups.unpack(weight, scale=scale), weight.float() * spread)


def test_scales_of_fused_experts() -> None:
    weight = torch.randn(3, 4, 6).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 1, 6)
    assert torch.equal(scaled(FP8).unpack(weight, scale=scale), weight.float() * scale)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (4, 4), (1, 2, 2)])
def test_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        scaled(FP8).unpack(torch.zeros(4, 6).to(torch.float8_e4m3fn), scale=torch.rand(shape))
