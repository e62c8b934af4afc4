"""A tiny model and its data, for tests of the training loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarmcore.training import FitReport, fit_sync

DATA = [(torch.randn(4, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(21)]
HELD_OUT = DATA[:5]
Batch = tuple[torch.Tensor, torch.Tensor]


def tiny_model() -> nn.Module:
    """With all that may make a continued run differ: dropout, running statistics, frozen parts."""
    torch.manual_seed(7)
    random.seed(7)
    model = nn.Sequential(
        nn.Linear(4, 8).requires_grad_(False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    return model.eval()


def collate(examples: list[tuple[torch.Tensor, int]]) -> Batch:
    inputs, labels = zip(*examples, strict=True)
    return torch.stack(inputs) + random.random() * 0.1, torch.tensor(labels)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> dict[str, Any]:
    return {"accuracy": (model(batch[0]).argmax(-1) == batch[1]).float().mean()}


def options(model: nn.Module, **others: Any) -> dict[str, Any]:
    """Optimiser and scheduler are new ones for each call, as in a new process."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return {
        "epochs": 2,
        "batch_size": 3,
        "accumulate": 2,
        "clip_norm": 1.0,
        "evaluation": HELD_OUT,
        "metrics": accuracy,
        "evaluate_every": 3,
        "optimizer": optimizer,
        "scheduler": scheduler,
        **others,
    }


def state_of(model: nn.Module, report: FitReport) -> tuple[dict[str, Any], FitReport]:
    return {name: value.tolist() for name, value in model.state_dict().items()}, report


class Stop(Exception):
    pass


class StopAt:
    """A loss function that does something at its call number ``at``."""

    def __init__(self, at: int, what: Callable[[], object]) -> None:
        self.calls, self.at, self.what = 0, at, what

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.calls += 1
        result = loss(model, batch)  # its random numbers have been drawn by then
        if self.calls == self.at:
            self.what()
        return result


def whole_run() -> tuple[dict[str, Any], FitReport]:
    model = tiny_model()
    return state_of(model, fit_sync(model, DATA, collate, loss, **options(model)))


def raise_stop() -> None:
    raise Stop


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)
