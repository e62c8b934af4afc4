"""Transformers' Trainer and accelerate's loop on remote models; and what of them is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_swarm import Tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM as PlainModel
from transformers import AutoModelForSequenceClassification as PlainClassifier
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, set_seed

from swarmcore.errors import CheckpointError, InputError, ModelMismatchError
from swarmcore.training import (
    SequenceClassificationHead,
    TunedModel,
    lora_tuning,
    prompt_tuning,
    training_modes,
)
from swarmcore.transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = torch.randint(3, 120, (12, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * (7 - i % 3) + [0] * (i % 3) for i in range(12)])
DATA = [
    {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor(i % 3)}
    for i, (ids, mask) in enumerate(zip(IDS, MASK, strict=True))
]
TEXTS = [
    {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for ids, mask in zip(IDS, MASK, strict=True)
]
LABELS = {0: "no", 1: "perhaps", 2: "yes"}


def classifier(tiny: Tiny, folder: Path | None = None) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        folder or tiny.folder, swarm=tiny.swarm, dtype="float32", id2label=LABELS
    )


def trained(model: Any, folder: Path, *, steps: int = 6, resume: bool = False) -> list[float]:
    """Train the head with Transformers' Trainer, saving every three steps; return the losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:4])
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.evaluate()["eval_loss"] > 0
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_trains_a_head_as_on_the_plain_model(llama: Tiny, tmp_path: Path) -> None:
    plain = PlainClassifier.from_pretrained(llama.folder, dtype=torch.float32, id2label=LABELS)
    plain.base_model.requires_grad_(False)
    remote = classifier(llama)
    remote.score.load_state_dict(plain.score.state_dict())
    losses = [trained(model, tmp_path / name) for name, model in (("plain", plain), ("remote", remote))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(remote.score.weight, plain.score.weight, atol=1e-5, rtol=1e-4)

    saved = tmp_path / "remote" / "checkpoint-3"
    assert not (saved / "config.json").exists(), "it is no whole model"
    assert (saved / "model.safetensors").stat().st_size < 2000
    set_seed(99)
    again = classifier(llama)
    trained(again, tmp_path / "remote", resume=True)
    torch.testing.assert_close(again.score.weight, remote.score.weight)


@pytest.mark.parametrize("head", [None, SequenceClassificationHead])
def test_trainer_trains_what_is_tuned_in_small_batches_as_in_large_ones(
    llama: Tiny, head: Any, tmp_path: Path
) -> None:
    losses = []
    data = DATA if head else TEXTS
    for accumulated in (1, 2):
        top = head.for_model(llama.remote.config, 3, seed=2) if head else None
        tuned = lora_tuning(llama.remote, rank=2, head=top, seed=1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=tuned, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert trainer.predict(data[:3]).predictions.shape == ((3, 3) if head else (3, 7, 128))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def language_model_losses(
    model: Any, folder: Path, *, left: bool = False, packed: bool = False, **options: Any
) -> tuple[list[float], float]:
    """Train with Transformers' Trainer; return the losses of its steps, and of an evaluation.

    ``left``: with the padding before the texts; ``packed``: one after the other in a row, without padding.
    """
    data = [{name: row.flip(0) for name, row in text.items()} for text in TEXTS] if left else TEXTS
    collator = None
    if packed:
        data = [{"input_ids": text["input_ids"][: text["attention_mask"].sum()].tolist()} for text in TEXTS]
        collator = DataCollatorWithFlattening()
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        | options
    )
    trainer = Trainer(model, arguments, collator, train_dataset=data, eval_dataset=data[:4])
    trainer.train(resume_from_checkpoint=options.get("max_steps") == 5)
    evaluated = trainer.evaluate()["eval_loss"]
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], evaluated


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "accumulation and label smoothing": {"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1},
    "packed": {"packed": True},
    "padding before": {"left": True, "gradient_accumulation_steps": 2},
    "smoothing and padding before": {"left": True, "label_smoothing_factor": 0.2},
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_has_the_losses_of_peft_on_the_plain_model(llama: Tiny, name: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    losses = []
    for kind in ("plain", "PEFT", "tuned"):
        torch.manual_seed(1)
        base = PlainModel.from_pretrained(llama.folder, dtype=torch.float32)
        model: Any = get_peft_model(base if kind == "plain" else copy.deepcopy(llama.remote), config)
        if kind == "tuned":
            model.save_pretrained(tmp_path / "start")
            model = TunedModel.load(llama.remote, tmp_path / "start")
        losses.append(language_model_losses(model, tmp_path / kind, **OPTIONS[name]))
        assert not llama.remote.get_input_embeddings().training
    for steps, evaluated in losses[1:]:
        assert steps == pytest.approx(losses[0][0], rel=1e-4)
        assert evaluated == pytest.approx(losses[0][1], rel=1e-4)
    assert len(set(losses[0][0])) == 3


def test_gradient_checkpointing_is_noted_once(llama: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    training_modes._note_checkpointing.cache_clear()
    tuned = lora_tuning(llama.remote, rank=2)
    for model in (llama.remote, tuned, tuned):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.activation_checkpointing_enable()
        assert not model.is_gradient_checkpointing
        assert not model.is_activation_checkpointing
        model.gradient_checkpointing_disable()
        model.activation_checkpointing_disable()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "gradient checkpointing makes no difference"
    ]


def test_a_model_of_which_nothing_is_trained(llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to train.*get_peft_model"):
        language_model_losses(copy.deepcopy(llama.remote), tmp_path)


def test_dropout_that_is_left_out_is_noted_once(llama: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    training_modes._note_dropout.cache_clear()
    config = copy.deepcopy(llama.remote.config)
    for name, value in {"attention_dropout": 0.1, "embd_pdrop": 0.1, "hidden_dropout": 0.0}.items():
        setattr(config, name, value)
    remote = copy.deepcopy(llama.remote)
    remote.config = config
    remote.eval()
    assert not caplog.records
    lora_tuning(remote, rank=2).train()
    remote.train()
    [record] = caplog.records
    assert "(attention_dropout=0.1)" in record.message


def one_with_lora(kind: str, remote: Any, seed: int) -> Any:
    if kind == "tuned":
        return lora_tuning(remote, rank=2, seed=seed)
    remote = copy.deepcopy(remote)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    if kind == "PEFT":
        return get_peft_model(remote, config)
    remote.add_adapter(config)
    return remote


@pytest.mark.parametrize("kind", ["tuned", "PEFT", "added"])
def test_checkpoints_of_adapters(llama: Tiny, kind: str, tmp_path: Path) -> None:
    """They have PEFT's files; training goes on from them, and the best one is loaded at the end."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    model = one_with_lora(kind, llama.remote, 1)
    first, evaluated = language_model_losses(
        model, tmp_path / "parts", lr_scheduler_type="constant", **saving
    )
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in checkpoint.iterdir()
    }
    plain = PeftModel.from_pretrained(
        PlainModel.from_pretrained(llama.folder, dtype=torch.float32), checkpoint
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    again = one_with_lora(kind, llama.remote, 2)
    later, _ = language_model_losses(
        again, tmp_path / "parts", max_steps=5, lr_scheduler_type="constant", **saving
    )
    straight, _ = language_model_losses(
        one_with_lora(kind, llama.remote, 1), tmp_path / "whole", max_steps=6, lr_scheduler_type="constant"
    )
    assert first == pytest.approx(straight[:3], rel=1e-4)
    assert later == pytest.approx(straight[:5], rel=1e-4)

    best = one_with_lora(kind, llama.remote, 1)
    best_of = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    worse = {
        "greater_is_better": True,
        "metric_for_best_model": "eval_loss",
    }  # so that it is not the last one
    _, loss = language_model_losses(best, tmp_path / "best", **saving | best_of | worse)
    assert loss > evaluated


def test_accelerate_trains_a_soft_prompt(llama: Tiny) -> None:
    tuned = prompt_tuning(llama.remote, tokens=4, seed=1)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1)
    loader = DataLoader(DATA[:8], batch_size=4)
    tuned, optimizer, loader = accelerator.prepare(tuned, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            ids = batch["input_ids"]
            labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
            with accelerator.accumulate(tuned):
                loss = tuned(ids, batch["attention_mask"], labels=labels).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-2:]) < sum(losses[:2])


def test_what_is_saved_comes_back(llama: Tiny, tmp_path: Path) -> None:
    model = classifier(llama)
    model.save_pretrained(tmp_path, state_dict={"score.weight": model.score.weight + 1})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, swarm=llama.swarm, dtype="float32")
    torch.testing.assert_close(loaded.score.weight, model.score.weight + 1)
    assert loaded.config.id2label == LABELS
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == ["score.weight"]


def test_what_cannot_be_saved_or_loaded(llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to save"):
        llama.remote.save_pretrained(tmp_path)
    model = classifier(llama)
    with pytest.raises(InputError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, swarm=llama.swarm)
    about = tmp_path / "remote_model.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"fingerprint": "of another model"}))
    with pytest.raises(ModelMismatchError, match="of another m;"):
        classifier(llama, tmp_path)
    about.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        classifier(llama, tmp_path)
