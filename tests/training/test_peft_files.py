"""PEFT's files, both ways: the same outputs from what it wrote and from what it reads; errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapter import hidden_with_adapter
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from swarmcore.errors import AdapterError, StorageError
from swarmcore.training import (
    CombinedAdapter,
    LoraAdapter,
    PrefixAdapter,
    SequenceClassificationHead,
    SoftPrompt,
    TokenClassificationHead,
    load_adapter,
    save_adapter,
)
from swarmcore.training.peft_format import read_adapter
from swarmcore.types import Span

# What peft does with a model gives warnings about the future of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

FAMILIES = ["llama", "qwen3", "gpt2", "bloom"]
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bloom": ["query_key_value", "dense"],
}
IDS = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(0))


def plain_model(family: str, kind: Any = AutoModelForCausalLM, labels: int = 2) -> Any:
    config = tiny_config(family)
    config.num_labels, config.pad_token_id = labels, 0
    torch.manual_seed(1)
    return kind.from_config(config).eval()


def random_adapter(kind: str, family: str) -> LoraAdapter | PrefixAdapter | SoftPrompt:
    config = tiny_config(family)
    if kind == "prompt":
        return SoftPrompt.random(3, config.hidden_size, seed=2)
    if kind == "prefix":
        return PrefixAdapter.for_model(config, tokens=3, seed=2)
    adapter = LoraAdapter.for_model(
        config, targets=TARGETS[family], blocks=Span(1, 4), rank=4, alpha=6, seed=2
    )
    return randomised(adapter)


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name or "prompt" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@torch.no_grad()
def logits_of_peft(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits[:, -IDS.shape[1] :]


def logits_of_mine(family: str, adapter: Any) -> torch.Tensor:
    model = plain_model(family)
    logits: torch.Tensor = model.get_output_embeddings()(hidden_with_adapter(model, adapter, IDS))
    return logits.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_peft_reads_what_is_saved(kind: str, family: str, tmp_path: Path) -> None:
    adapter = random_adapter(kind, family)
    save_adapter(tmp_path, adapter, tiny_config(family), base_model="tiny")
    theirs = PeftModel.from_pretrained(plain_model(family), str(tmp_path))
    expected = logits_of_mine(family, adapter)
    torch.testing.assert_close(logits_of_peft(theirs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain_model(family)(input_ids=IDS).logits).abs().max() > 0.01
    back = load_adapter(tmp_path, tiny_config(family))
    assert back.base_model == "tiny"
    assert isinstance(back.adapter, type(adapter))
    for ours, read in zip(adapter.parameters(), back.adapter.parameters(), strict=True):
        assert torch.equal(ours, read)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_what_peft_saved_is_read(kind: str, family: str, tmp_path: Path) -> None:
    lora: dict[str, Any] = {"target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    config = {
        "lora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, task_type="CAUSAL_LM", **lora),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]
    theirs = randomised(get_peft_model(plain_model(family), config))
    theirs.save_pretrained(str(tmp_path))
    mine = load_adapter(tmp_path, tiny_config(family)).adapter
    torch.testing.assert_close(logits_of_mine(family, mine), logits_of_peft(theirs), rtol=1e-5, atol=1e-5)
    if isinstance(mine, LoraAdapter | PrefixAdapter):
        weights, scaling = read_adapter(tmp_path, Span(1, 3), tiny_config(family))
        assert scaling == mine.scaling
        expected = mine.named_weights(Span(1, 3))
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    else:
        with pytest.raises(AdapterError, match="is a soft prompt"):
            read_adapter(tmp_path, Span(1, 3), tiny_config(family))


def test_ranks_and_alphas_by_pattern_go_both_ways(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3},
        task_type="CAUSAL_LM",
    )
    theirs = randomised(get_peft_model(plain_model("llama"), config))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = load_adapter(tmp_path / "theirs", tiny_config("llama")).adapter
    assert isinstance(mine, LoraAdapter)
    assert mine.named_weights()["1.self_attn.q_proj.lora_A"].shape == (2, 64)
    expected = logits_of_peft(theirs)
    # One scaling for all: this projection's alpha over its rank is 4 where the others' is 2.
    torch.testing.assert_close(logits_of_mine("llama", mine), expected, rtol=1e-5, atol=1e-5)
    save_adapter(tmp_path / "mine", mine, tiny_config("llama"))
    again = PeftModel.from_pretrained(plain_model("llama"), str(tmp_path / "mine"))
    torch.testing.assert_close(logits_of_peft(again), expected, rtol=1e-5, atol=1e-5)


def test_an_irregular_choice_of_projections_is_named_one_by_one(tmp_path: Path) -> None:
    pattern = r".*layers\.(0\.self_attn\.q_proj|3\.mlp\.up_proj)"
    mine = randomised(LoraAdapter.for_model(tiny_config("llama"), targets=pattern, rank=2))
    save_adapter(tmp_path, mine, tiny_config("llama"))
    theirs = PeftModel.from_pretrained(plain_model("llama"), str(tmp_path))
    expected = logits_of_mine("llama", mine)
    torch.testing.assert_close(logits_of_peft(theirs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_go_both_ways(task: str, family: str, kind: str, tmp_path: Path) -> None:
    classify = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
    head_class = {"SEQ_CLS": SequenceClassificationHead, "TOKEN_CLS": TokenClassificationHead}[task]
    config, adapter = tiny_config(family), random_adapter(kind, family)
    head = head_class.for_model(config, 3, seed=4)
    save_adapter(tmp_path / "mine", adapter, config, head=head)
    plain = plain_model(family, classify[task], labels=3)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "mine")).eval()
    with torch.no_grad():
        theirs_logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        mine_logits = head(hidden_with_adapter(plain_model(family, classify[task]), adapter, IDS))
    torch.testing.assert_close(
        theirs_logits[:, -IDS.shape[1] :] if task == "TOKEN_CLS" else theirs_logits,
        mine_logits,
        rtol=1e-5,
        atol=1e-5,
    )

    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(tmp_path / "theirs", config).head
    assert isinstance(back, head_class)
    for ours, read in zip(head.parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, read)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path, random_adapter("lora", "llama"), tiny_config("llama"))
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "of the kind LOHA; only LORA, PREFIX_TUNING and PROMPT_TUNING"),
        ({"use_dora": True}, r"variant of LoRA \(use_dora\).*train it again without, or merge it"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"megatron_config": {"tensor_parallel": 2}}, "megatron_config"),
        (
            {"lora_bias": True, "use_qalora": True},
            r"\(.*lora_bias.*use_qalora.*\)|\(.*use_qalora.*lora_bias.*\)",
        ),
        ({"an_option_of_a_newer_version": "on"}, "an_option_of_a_newer_version='on'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"modules_to_save": ["score", "embed_tokens"]}, r"layers of its own \(embed_tokens\)"),
        ({"r": "four"}, "damaged"),
        ({"r": 0}, "ranks must be 1 or more"),
        ({"lora_alpha": 0}, "no effect"),
        ({"r": 8}, r"is \[4, 64\].*take \[8, 64\].*do not belong together"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
    ],
)
def test_settings_that_cannot_be_used(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapter(saved, tiny_config("llama"))
    with pytest.raises(AdapterError, match=message):
        read_adapter(saved, Span(0, 2), tiny_config("llama"))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_options_of_prompts(kind: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(kind, "llama"), tiny_config("llama"))
    edit_config(tmp_path, tokenizer_kwargs={} if kind == "prompt" else None, prefix_projection=False)
    load_adapter(tmp_path, tiny_config("llama"))
    edit_config(tmp_path, num_transformer_submodules=2)
    with pytest.raises(AdapterError, match="2 stacks of blocks"):
        load_adapter(tmp_path, tiny_config("llama"))
    edit_config(tmp_path, num_transformer_submodules=1, newly_gated=True)
    with pytest.raises(AdapterError, match=r"variant of (PREFIX|PROMPT)_TUNING \(newly_gated\)"):
        load_adapter(tmp_path, tiny_config("llama"))


def test_options_that_are_off_or_make_no_difference(saved: Path) -> None:
    before = load_adapter(saved, tiny_config("llama")).adapter
    edit_config(
        saved,
        an_option_of_a_newer_version=None,
        use_dora=False,
        bias="none",
        megatron_core="megatron.core",
        qalora_group_size=16,
        eva_config={"rho": 2.0},
        layers_pattern="layers",
        fan_in_fan_out=False,
        exclude_modules=["lm_head"],
    )
    after = load_adapter(saved, tiny_config("llama")).adapter
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_dropout_is_kept_for_whoever_trains_it_further(saved: Path) -> None:
    edit_config(saved, lora_dropout=0.25)
    adapter = load_adapter(saved, tiny_config("llama")).adapter
    assert isinstance(adapter, LoraAdapter)
    assert adapter.dropout == 0.25


def test_an_adapter_of_another_model(saved: Path) -> None:
    with pytest.raises(AdapterError, match="made for another model"):
        load_adapter(saved, tiny_config("bloom"))
    wider = tiny_config("llama")
    wider.hidden_size = 128
    with pytest.raises(AdapterError, match=r"\[4, 64\].*take \[4, 128\]: it was made for another model"):
        load_adapter(saved, wider)
    shorter = tiny_config("llama")
    shorter.num_hidden_layers = 2
    with pytest.raises(AdapterError, match=r"in the 2 blocks of a llama model"):
        read_adapter(saved, Span(0, 1), shorter)
    with pytest.raises(AdapterError, match="does not fit a projection"):
        save_adapter(saved, random_adapter("lora", "llama"), wider)
    for kind in ("prompt", "prefix"):
        save_adapter(saved, random_adapter(kind, "llama"), tiny_config("llama"))
        wider.num_key_value_heads = 4
        with pytest.raises(AdapterError, match="made for another model"):
            load_adapter(saved, wider)


def test_files_that_are_damaged_missing_or_pickles(saved: Path, tmp_path: Path) -> None:
    config, file = tiny_config("llama"), saved / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole[:40], b"", b"\xff" * 100, whole.replace(b"F32", b"Q32", 1)):
        file.write_bytes(damaged)
        with pytest.raises(AdapterError, match="damaged, copy it again"):
            load_adapter(saved, config)
    file.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_adapter(saved, config)
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle, which can run any code and is never read"):
        load_adapter(saved, config)
    (saved / "adapter_config.json").write_bytes(b"{")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(saved, config)
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path / "nothing", config)


def test_tensors_that_are_missing_strange_or_not_finite(saved: Path) -> None:
    config, file = tiny_config("llama"), saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in tensors.items() if k != name}, r"lacks lora_B of 1\.self_attn\.q_proj"),
        ({**tensors, name: tensors[name] * float("nan")}, "not finite"),
        ({**tensors, name: tensors[name].int()}, "is torch.int32"),
        ({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is no low-rank update"),
        ({**tensors, name.replace("lora_B.weight", "lora_magnitude_vector"): torch.zeros(2)}, "variant"),
        ({**tensors, "base_model.model.score.weight": torch.zeros(2, 64)}, "does not go with its task"),
        ({}, "no low-rank updates"),
    ]
    for content, message in cases:
        save_file(content, file)
        with pytest.raises(AdapterError, match=message):
            load_adapter(saved, config)


def test_a_server_reads_its_share_alone(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".layers.3." in name:
            tensors[name] *= float("nan")
    save_file(tensors, file)
    weights, scaling = read_adapter(saved, Span(0, 3), tiny_config("llama"))
    assert {name.partition(".")[0] for name in weights} == {"1", "2"}
    assert scaling == 1.5
    assert read_adapter(saved, Span(4, 5), tiny_config("llama")) == ({}, 1.5)


def test_saving_what_has_no_file(tmp_path: Path) -> None:
    config = tiny_config("llama")
    both = CombinedAdapter(LoraAdapter.for_model(config), PrefixAdapter.for_model(config, tokens=2))
    with pytest.raises(AdapterError, match="each of its parts in a folder of its own"):
        save_adapter(tmp_path, both, config)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be written"):
        save_adapter(tmp_path / "file", LoraAdapter.for_model(config), config)
