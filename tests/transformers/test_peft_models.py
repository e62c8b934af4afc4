"""PEFT on remote models as on local ones: the same losses, texts and files; what servers do not compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_swarm import Tiny
from transformers import AutoModelForCausalLM as PlainModel
from transformers import AutoModelForSequenceClassification as PlainClassifier

from swarmcore.errors import AdapterError, InputError
from swarmcore.training import LoraAdapter, lora_tuning
from swarmcore.transformers import AutoModelForSequenceClassification

# What peft does with a plain model gives warnings about the future of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.randint(3, 120, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
LABELS = IDS.masked_fill(MASK == 0, -100)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        | options
    )


def plain(tiny: Tiny) -> Any:
    return PlainModel.from_pretrained(tiny.folder, dtype=torch.float32).eval()


def trained(model: Any, config: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def generated(model: Any) -> list[int]:
    ids = IDS[:1]
    text = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    tokens: list[int] = text[0].tolist()
    return tokens[-4:]


CONFIGS = {
    "plain": lora(),
    "rank-stabilised": lora(use_rslora=True, init_lora_weights="gaussian"),
    "patterns": lora(
        rank_pattern={"layers.1.*": 8}, alpha_pattern={"layers.2.*": 3}, init_lora_weights=False
    ),
    "some layers": lora(layers_to_transform=[1, 3]),
    "all linear layers": lora(target_modules="all-linear"),
    "one excluded": lora(exclude_modules=r".*layers\.0\..*"),
    "head saved": lora(modules_to_save=["lm_head"]),
    "embeddings too": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "rows of embeddings": lora(trainable_token_indices=[5, 6]),
    "soft prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_generation_and_files_are_those_of_a_local_model(
    llama: Tiny, name: str, tmp_path: Path
) -> None:
    theirs, expected = trained(plain(llama), copy.deepcopy(CONFIGS[name]))
    mine, found = trained(copy.deepcopy(llama.remote), copy.deepcopy(CONFIGS[name]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    assert generated(mine) == generated(theirs)
    with mine.disable_adapter(), torch.no_grad():
        assert generated(mine) == generated(llama.plain)
        torch.testing.assert_close(mine(input_ids=IDS).logits, llama.plain(IDS).logits, atol=1e-5, rtol=1e-4)

    mine.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(plain(llama), tmp_path)
    remote = PeftModel.from_pretrained(copy.deepcopy(llama.remote), tmp_path)
    with torch.no_grad():
        logits = theirs(input_ids=IDS).logits
        torch.testing.assert_close(back(input_ids=IDS).logits, logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(remote(input_ids=IDS).logits, logits, atol=1e-3, rtol=1e-3)


def test_several_adapters(llama: Tiny) -> None:
    models = []
    for base in (plain(llama), copy.deepcopy(llama.remote)):
        torch.manual_seed(3)
        model = get_peft_model(base, lora(init_lora_weights=False))
        model.add_adapter("other", lora(r=2, target_modules=["v_proj", "q_proj"], init_lora_weights=False))
        models.append(model.eval())
    for active in ("other", "default", ["default", "other"]):
        logits = []
        for model in models:
            model.base_model.set_adapter(active)
            with torch.no_grad():
                logits.append(model(input_ids=IDS).logits)
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    tuned = lora_tuning(models[1].get_base_model(), rank=2)
    with torch.no_grad():
        torch.testing.assert_close(tuned(IDS).logits, logits[1], atol=1e-5, rtol=1e-4)  # it adds nothing yet
        assert isinstance(tuned.adapter, LoraAdapter)
        tuned.adapter.get_parameter("blocks.0.self_attn.q_proj.lora_B").fill_(1)
        assert not torch.allclose(tuned(IDS).logits, logits[1])
    unloaded = models[1].unload()
    with torch.no_grad():
        torch.testing.assert_close(unloaded(IDS).logits, llama.plain(IDS).logits, atol=1e-5, rtol=1e-4)


def test_adapters_that_transformers_adds_and_loads(llama: Tiny, tmp_path: Path) -> None:
    outputs = []
    for base in (plain(llama), copy.deepcopy(llama.remote)):
        torch.manual_seed(3)
        base.add_adapter(lora(init_lora_weights=False))
        base.save_pretrained(tmp_path / type(base).__module__)
        with torch.no_grad():
            outputs.append((base(IDS).logits, generated(base)))
            base.disable_adapters()
            torch.testing.assert_close(base(IDS).logits, llama.plain(IDS).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[1][0], outputs[0][0], atol=1e-4, rtol=1e-4)
    assert outputs[1][1] == outputs[0][1]
    for folder in tmp_path.iterdir():
        remote = copy.deepcopy(llama.remote)
        remote.load_adapter(str(folder))
        with torch.no_grad():
            torch.testing.assert_close(remote(IDS).logits, outputs[0][0], atol=1e-4, rtol=1e-4)


REFUSED: list[tuple[PeftConfig, str]] = [
    (lora(use_dora=True), "use_dora"),
    (lora(init_lora_weights="pissa"), "pissa"),
    (lora(init_lora_weights="olora"), "olora"),
    (lora(init_lora_weights="mica"), "mica"),
    (lora(bias="all"), "bias='all'"),
    (lora(lora_bias=True), "lora_bias"),
    (lora(lora_dropout=0.1), r"lora_dropout=0\.1"),
    (lora(layer_replication=[(0, 2), (1, 3)]), "layer_replication"),
    (lora(target_parameters=["mlp.experts"]), "target_parameters"),
    (lora(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    (lora(use_qalora=True), "use_qalora"),
    (lora(modules_to_save=["v_proj"]), "ModulesToSaveWrapper"),
    (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "ia3"),
    (LoHaConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"), "loha"),
    (AdaLoraConfig(target_modules=["k_proj"], total_step=9, task_type="CAUSAL_LM"), "AdaLoRA"),
]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:target_parameters=.* were set but:RuntimeWarning")
@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_servers_do_not_compute(llama: Tiny, config: PeftConfig, message: str) -> None:
    remote = copy.deepcopy(llama.remote)
    with pytest.raises(AdapterError, match=message):
        get_peft_model(remote, config)
    with torch.no_grad():  # it is as it was
        torch.testing.assert_close(remote(IDS).logits, llama.plain(IDS).logits, atol=1e-5, rtol=1e-4)
    get_peft_model(remote, lora())


def test_an_option_of_a_newer_version(llama: Tiny) -> None:
    import dataclasses

    newer = dataclasses.make_dataclass("Newer", [("use_new", int, 3)], bases=(LoraConfig,))
    config = newer(**lora().to_dict() | {"runtime_config": lora().runtime_config, "peft_version": None})
    get_peft_model(copy.deepcopy(llama.remote), copy.deepcopy(config))
    for value in (4, 0):
        config.use_new = value
        with pytest.raises(AdapterError, match=r"use_new='?[40]"):
            get_peft_model(copy.deepcopy(llama.remote), copy.deepcopy(config))


def test_a_second_adapter_that_servers_do_not_compute(llama: Tiny) -> None:
    model = get_peft_model(copy.deepcopy(llama.remote), lora(init_lora_weights=False)).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.add_adapter("other", lora(bias="all"))
        torch.testing.assert_close(model(input_ids=IDS).logits, before)  # it is not in use
        model.base_model.set_adapter("other")
        with pytest.raises(AdapterError, match="bias='all'"):
            model(input_ids=IDS)
    remote = copy.deepcopy(llama.remote)
    remote.add_adapter(lora(init_lora_weights=False))
    with torch.no_grad():
        before = remote(IDS).logits
        with pytest.raises(AdapterError, match="bias='all'"), pytest.warns(UserWarning, match="peft_config"):
            remote.add_adapter(lora(bias="all"), "other")
        remote.set_adapter("default")
        torch.testing.assert_close(remote(IDS).logits, before)  # the first one is not lost


def test_a_cache_is_of_one_adapter(llama: Tiny) -> None:
    model = get_peft_model(copy.deepcopy(llama.remote), lora(init_lora_weights=False)).eval()
    ids = IDS[:1]
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        again = model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(again.logits, whole, atol=1e-4, rtol=1e-4)
        for cache in (first.past_key_values, copy.deepcopy(first.past_key_values)):
            with model.disable_adapter(), pytest.raises(InputError, match="another adapter"):
                model(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match="another adapter"):
            model(input_ids=ids, past_key_values=llama.remote.new_cache())
        first.past_key_values.close()


def test_continuous_batching(llama: Tiny) -> None:
    with pytest.raises(InputError, match="continuous batching"):
        llama.remote.generate_batch(inputs=[[5, 6, 7]])


@pytest.mark.parametrize("padding", ["before", "behind"])
def test_classifiers(llama: Tiny, padding: str) -> None:
    mask = MASK.flip(1) if padding == "before" else MASK
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    results = []
    for auto in (PlainClassifier, AutoModelForSequenceClassification):
        options = {} if auto is PlainClassifier else {"swarm": llama.swarm}
        torch.manual_seed(4)
        base = auto.from_pretrained(llama.folder, dtype=torch.float32, num_labels=3, **options)
        with torch.no_grad():
            base.score.weight.copy_(torch.linspace(-1, 1, 192).view(3, 64))
        torch.manual_seed(4)
        model = get_peft_model(base, copy.deepcopy(config))
        output = model(input_ids=IDS * mask, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((output.loss.detach(), output.logits.detach(), gradients))
    torch.testing.assert_close(results[1][:2], results[0][:2], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(results[1][2], results[0][2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_what_is_done_to_the_layers_later(llama: Tiny) -> None:
    model = get_peft_model(copy.deepcopy(llama.remote), lora(init_lora_weights=False))
    with pytest.raises(AdapterError, match="merging"):
        model.merge_adapter()
    with pytest.raises(AdapterError, match="merging"):
        model.merge_and_unload()
    with pytest.raises(AdapterError, match="adapter_names"):
        model.eval()(input_ids=IDS, adapter_names=["default", "default", "__base__"])
    model = get_peft_model(copy.deepcopy(llama.remote), lora(init_lora_weights=False))
    layer = model.base_model.model.model.get_submodule("layers.0.self_attn.q_proj")
    layer.lora_dropout["default"] = torch.nn.Dropout(0.2)
    with pytest.raises(AdapterError, match=r"lora_dropout=0\.2"):
        model(input_ids=IDS)
    model.eval()(input_ids=IDS)
    prefixed = get_peft_model(
        copy.deepcopy(llama.remote), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(InputError, match="deep_prompt_tuning"):
        prefixed(input_ids=IDS)
