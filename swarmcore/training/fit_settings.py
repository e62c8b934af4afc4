"""How a model is fitted: every setting, its range, and what holds when it is not given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from swarmcore.errors import InputError

Precision = Literal["float32", "bfloat16", "float16"]


@attrs.frozen
class StepReport:
    """One step of the optimiser, as it was taken."""

    step: int
    """Counted from 1."""
    epoch: int
    """Counted from 0."""
    loss: float
    """Mean over the step's examples."""
    gradient_norm: float
    """Of all gradients together, before clipping."""
    learning_rate: float


@attrs.frozen
class Evaluation:
    """What the evaluation after a step gave."""

    step: int
    values: dict[str, float]
    """``loss``, and what the metrics function returned; means over all examples."""


@attrs.frozen
class EarlyStop:
    """When evaluations no longer get better."""

    metric: str = "loss"
    """Which of `Evaluation.values`."""
    patience: int = 3
    """Evaluations without a new best after which training ends."""
    larger_is_better: bool = False
    margin: float = 0.0
    """By how much a value must be better than the best one before."""

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is a new best."""
        if best is None:
            return not math.isnan(value)
        return value > best + self.margin if self.larger_is_better else value < best - self.margin


class FitOptions(TypedDict, total=False):
    """The fields of `FitSettings`, as keyword arguments."""

    epochs: int
    max_steps: int | None
    batch_size: int
    accumulate: int
    learning_rate: float
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    clip_norm: float | None
    precision: Precision
    shuffle: bool
    seed: int
    evaluate_every: int | None
    early_stop: EarlyStop | None
    keep_best: bool
    checkpoint: str | Path | None
    checkpoint_every: int
    resume: bool
    progress: bool
    on_step: Callable[[StepReport], None] | None
    on_evaluation: Callable[[Evaluation], None] | None


@attrs.frozen(kw_only=True)
class FitSettings:
    """Settings of one run. Raise `InputError` for a value out of its range."""

    epochs: int = 1
    """How often all data is gone through."""
    max_steps: int | None = None
    """Steps after which it ends, if the epochs do not end before."""
    batch_size: int = 8
    """Examples in one forward and backward pass."""
    accumulate: int = 1
    """Passes whose gradients make one step."""
    learning_rate: float = 1e-3
    """Of the AdamW that is used without an ``optimizer``; it has no weight decay."""
    optimizer: Optimizer | None = None
    scheduler: LRScheduler | None = None
    """Moved on after every step of the optimiser; belongs to ``optimizer``."""
    clip_norm: float | None = None
    """What the norm of all gradients together is limited to."""
    precision: Precision = "float32"
    """What local parts compute in where torch's autocast finds it safe; parameters stay as they are."""
    shuffle: bool = True
    """Go through the data in another order in each epoch."""
    seed: int = 0
    """Of those orders, and of nothing else."""
    evaluate_every: int | None = None
    """Steps between evaluations; None for one after each epoch. There is always one at the end."""
    early_stop: EarlyStop | None = None
    keep_best: bool = False
    """End with the parameters of the best evaluation, by `early_stop`'s metric or the loss."""
    checkpoint: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """File to keep the state in; None for none. The state of the global random generators is a part of it,
    which runs in one process at the same time share."""
    checkpoint_every: int = 100
    """Steps between two writes. It is written at the end, and when anything stops the run, as well."""
    resume: bool = True
    """Go on from the checkpoint where there is one."""
    progress: bool = True
    """Show a bar on stderr if that is a terminal."""
    on_step: Callable[[StepReport], None] | None = None
    on_evaluation: Callable[[Evaluation], None] | None = None

    def __attrs_post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulate", "checkpoint_every", "max_steps", "evaluate_every")
        for name in counts:
            value = getattr(self, name)
            optional = name in ("max_steps", "evaluate_every")
            if not (value is None and optional) and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a whole number, 1 or more; got {value!r}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must be from 0 to 2**31 - 1; got {self.seed}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0; got {self.learning_rate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be above 0, or None for off; got {self.clip_norm}")
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise InputError(f"precision must be float32, bfloat16 or float16; got {self.precision!r}")
        if self.early_stop is not None and self.early_stop.patience < 1:
            raise InputError(f"the patience must be 1 evaluation or more; got {self.early_stop.patience}")
        if self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise InputError("the scheduler is of another optimizer: pass its own one as optimizer= too")

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def judge(self) -> EarlyStop:
        """What tells better evaluations from worse."""
        return self.early_stop or EarlyStop()

    def order(self, epoch: int, count: int) -> list[int]:
        """Indices of the data in the order of that epoch."""
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order
