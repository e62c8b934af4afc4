"""TRL's trainers and Transformers' pipelines on remote models, with PEFT's adapters and tuned models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tiny_models import save_random_model, tiny_config
from tiny_swarm import Tiny, served
from transformers import AutoModelForCausalLM as PlainModel
from transformers import pipeline
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from swarmcore import sync
from swarmcore.training import TunedModel
from swarmcore.transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
]

TEXTS = [{"text": f"The keeper number {i} lives by the sea."} for i in range(8)]
PAIRS = [{"prompt": f"Colour {i}?", "chosen": " Blue.", "rejected": " None at all."} for i in range(8)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """One whose vocabulary is that of the byte tokenizer."""
    disable_progress_bars()
    folder = tmp_path_factory.mktemp("trl")
    config = tiny_config("llama")
    config.vocab_size, config.pad_token_id, config.eos_token_id = 258, 257, 256
    plain = save_random_model(config, folder)
    with served(folder, "0:2", "2:5") as servers, sync.connect(str(servers[0].node.addresses[0])) as swarm:
        remote = AutoModelForCausalLM.from_pretrained(folder, swarm=swarm, dtype="float32")
        swarm.wait_for_blocks(remote.stack.model, timeout=30)
        with remote:
            yield Tiny(plain, remote, swarm, servers)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def lora() -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
        }
        | options
    )


def models(tiny: Tiny, folder: Path) -> Iterator[tuple[str, Any]]:
    """With the same adapter: PEFT's on the plain and on the remote model, and a tuned one."""
    for name, base in (("plain", plain(tiny)), ("remote", copy.deepcopy(tiny.remote))):
        torch.manual_seed(1)
        model = get_peft_model(base, lora())
        model.save_pretrained(folder / "start")
        yield name, model
    yield "tuned", TunedModel.load(tiny.remote, folder / "start")


def plain(tiny: Tiny) -> Any:
    return PlainModel.from_pretrained(tiny.folder, dtype=torch.float32)


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*")
@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_supervised(llama: Tiny, tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    losses = {}
    for name, model in models(llama, tmp_path):
        losses[name] = losses_of(
            SFTTrainer(
                model=model,
                args=arguments(SFTConfig, tmp_path, max_length=48, **options),
                train_dataset=Dataset.from_list(TEXTS),
                processing_class=tokenizer,
            )
        )
    assert losses["remote"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["tuned"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["plain"][-1] < losses["plain"][0]


def test_supervised_with_the_adapter_made_by_the_trainer(llama: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    losses = []
    for base in (plain(llama), copy.deepcopy(llama.remote)):
        trainer = SFTTrainer(
            model=base,
            args=arguments(SFTConfig, tmp_path, max_length=48, gradient_checkpointing=True),
            train_dataset=Dataset.from_list(TEXTS),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in (p for p in trainer.model.parameters() if p.requires_grad):
                weight.normal_(std=0.05)
        losses.append(losses_of(trainer))
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_preferences(llama: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    """The reference is the model with its adapter switched off; for a tuned one it is passed."""
    losses = {}
    for name, model in models(llama, tmp_path):
        losses[name] = losses_of(
            DPOTrainer(
                model=model,
                ref_model=copy.deepcopy(llama.remote) if name == "tuned" else None,
                args=arguments(DPOConfig, tmp_path, max_length=48),
                train_dataset=Dataset.from_list(PAIRS),
                processing_class=tokenizer,
            )
        )
    assert losses["remote"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["tuned"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["plain"][0] == pytest.approx(0.6931, abs=1e-3)
    assert losses["plain"][-1] < losses["plain"][0]


def test_rewards(llama: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    """What is sampled, and the losses on it, with a reference model for the divergence."""
    found = {}
    for name, model in models(llama, tmp_path):
        texts: list[str] = []

        def reward(completions: list[str], texts: list[str] = texts, **_: Any) -> list[float]:
            texts.extend(completions)
            return [float(len(set(text))) for text in completions]

        options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0 if name == "tuned" else 0.1}
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments(GRPOConfig, tmp_path, **options),
            train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
            processing_class=tokenizer,
        )
        found[name] = losses_of(trainer), texts
    assert found["remote"][1] == found["plain"][1]
    assert found["remote"][0] == pytest.approx(found["plain"][0], abs=1e-4)
    assert len(found["tuned"][1]) == 4
    assert found["tuned"][1][:2] == found["plain"][1][:2]
    assert llama.sessions_end()


def test_pipelines(llama: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    texts = {}
    bare = [("bare", llama.remote), ("bare plain", llama.plain)]
    for name, model in chain(models(llama, tmp_path), bare):
        if name == "remote":
            with torch.no_grad():
                for weight in (p for p in model.parameters() if p.requires_grad):
                    weight.normal_(std=0.1)
            model.save_pretrained(tmp_path / "start")
        generate = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer, batch_size=2)
        texts[name] = generate(["The sea", "A longer text"], max_new_tokens=4, do_sample=False)
    assert texts["bare"] == texts["bare plain"] == texts["plain"]  # whose update is none yet
    assert texts["tuned"] == texts["remote"] != texts["plain"]
