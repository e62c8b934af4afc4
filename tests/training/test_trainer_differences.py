"""Where Transformers' Trainer differs from `fit`: docs/decisions/training-loop.md.

When one of these fails, that reason is gone, and the decision is worth another look.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_fit import DATA, collate, linear, loss, tiny_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(TrainerCallback):
    """Stops a run in the middle of step ``after + 1``, and notes the gradients of each step."""

    def __init__(self, after: int = -1) -> None:
        self.after = after
        self.gradients: list[list[torch.Tensor]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


class MeanLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *others: Any, **options: Any) -> torch.Tensor:
        return loss(model, (inputs["x"], inputs["y"]))


def train(
    folder: Path, model: nn.Module, data: Any, stop: Stop, resume: Path | None = None, **options: Any
) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **options,
    )

    def as_mapping(examples: list[Any]) -> dict[str, torch.Tensor]:
        return dict(zip("xy", collate(examples), strict=True))

    trainer = MeanLoss(
        model=model, args=arguments, data_collator=as_mapping, train_dataset=data, callbacks=[stop]
    )
    try:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    except KeyboardInterrupt:
        assert stop.after >= 0


def test_a_step_weighs_its_micro_batches_alike_whatever_their_size(tmp_path: Path) -> None:
    model, stop, data = linear(), Stop(), DATA[:5]
    random.seed(0)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    train(tmp_path, model, data, stop, max_grad_norm=0, save_strategy="no", learning_rate=0.0, **options)
    wanted = linear()
    loss(wanted, collate(data)).backward()
    means = [p.grad for p in wanted.parameters() if p.grad is not None]
    furthest = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(stop.gradients[0], means, strict=True)
    )
    assert furthest > 0.2  # the random part of the data is a tenth


def test_a_run_that_goes_on_draws_other_random_numbers(tmp_path: Path) -> None:
    options = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "save_steps": 1,
        "learning_rate": 0.05,
    }
    whole, again = tiny_model(), tiny_model()
    whole.load_state_dict(again.state_dict())
    random.seed(7)
    train(tmp_path / "whole", whole, DATA, Stop(), **options)
    random.seed(7)
    train(tmp_path / "parts", tiny_model(), DATA, Stop(after=1), **options)
    train(tmp_path / "parts", again, DATA, Stop(), resume=tmp_path / "parts" / "checkpoint-1", **options)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_one_process_has_one_precision() -> None:
    Accelerator(mixed_precision="no", cpu=True)  # as any Trainer makes one
    with pytest.raises(ValueError, match="AcceleratorState has already been initialized"):
        Accelerator(mixed_precision="bf16", cpu=True)
