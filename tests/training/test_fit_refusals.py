"""Runs that cannot be, and checkpoints that are not theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_fit import (
    DATA,
    HELD_OUT,
    Batch,
    Stop,
    StopAt,
    collate,
    linear,
    loss,
    options,
    tiny_model,
)
from torch import nn

from swarmcore.errors import CheckpointError, InputError, InvalidBatchError, StorageError
from swarmcore.training import EarlyStop, fit_sync


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    file, model = tmp_path / "run.pt", tiny_model()
    fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file))
    chosen = options(model, checkpoint=file)
    with pytest.raises(InputError, match="with examples 21, not 20"):
        fit_sync(model, DATA[:20], collate, loss, **chosen)
    with pytest.raises(InputError, match="with batch_size 3, not 4"):
        fit_sync(model, DATA, collate, loss, **{**chosen, "batch_size": 4})
    with pytest.raises(InputError, match=r"another model: its parameters differ in 0\.bias"):
        model = tiny_model().requires_grad_(True)
        fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file))
    model = tiny_model()
    report = fit_sync(model, DATA[:20], collate, loss, **options(model, checkpoint=file, resume=False))
    assert report.steps == 8
    chosen = options(model, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        fit_sync(model, DATA, collate, loss, **chosen)
    with pytest.raises(StorageError):
        fit_sync(model, DATA, collate, loss, **{**chosen, "checkpoint": tmp_path})


def test_what_cannot_be_trained_says_why() -> None:
    def infinite(model: nn.Module, batch: Batch) -> torch.Tensor:
        return loss(model, batch) * float("inf")

    def exploding(model: nn.Module, batch: Batch) -> torch.Tensor:
        return (model(batch[0]) * 0).sqrt().sum()

    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"loss": infinite}, InvalidBatchError, "the loss after step 0 is inf"),
        ({"loss": exploding}, InvalidBatchError, "gradients of step 1 are not finite"),
        ({"loss": lambda model, batch: model(batch[0])}, InputError, "a tensor with one number"),
        ({"loss": lambda model, batch: torch.ones(())}, InputError, "does not depend on any trainable"),
        ({"data": []}, InputError, "no data to train on"),
        ({"data": iter(DATA)}, InputError, "got list_iterator; make a list of it"),
        ({"early_stop": EarlyStop(patience=0)}, InputError, "patience must be 1"),
        ({"evaluation": []}, InputError, "no data to evaluate on"),
        ({"keep_best": True}, InputError, "pass evaluation="),
        ({"batch_size": 0}, InputError, "batch_size must be a whole number"),
        ({"precision": "int4"}, InputError, "precision must be"),
        ({"early_stop": EarlyStop("f1"), "evaluation": HELD_OUT}, InputError, "'f1'.*there are loss"),
        (
            {"optimizer": torch.optim.SGD(linear().parameters())},
            InputError,
            "not trainable ones of the model",
        ),
        ({"model": linear().requires_grad_(False)}, InputError, "no trainable parameters"),
    ]
    for changes, error, message in cases:
        arguments = {"model": linear(), "data": DATA, "collate": collate, "loss": loss, **changes}
        with pytest.raises(error, match=message):
            fit_sync(**arguments)


def test_when_the_checkpoint_cannot_be_written_either_both_are_told(tmp_path: Path) -> None:
    folder, model = tmp_path / "folder", tiny_model()

    def stop_and_block() -> None:
        folder.touch()
        raise Stop

    with pytest.raises(Stop) as told:
        stopping = StopAt(3, stop_and_block)
        fit_sync(model, DATA, collate, stopping, **options(model, checkpoint=folder / "run.pt"))
    assert "could not be written either" in told.value.__notes__[0]
