"""One run of the training loop, a unit at a time: a micro-batch forward and back, or one of an evaluation.

Between any two units, and also in the middle of one, it can be stopped: what is kept is the state after the
last whole step, and what came after that is done again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import attrs
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from swarmcore.errors import InputError, InvalidBatchError
from swarmcore.training.fit_checkpoint import (
    buffers_of,
    live_buffers,
    random_states,
    read_checkpoint,
    restore_random_states,
    restore_tensors,
    write_checkpoint,
)
from swarmcore.training.fit_settings import Evaluation, FitSettings, StepReport

Example = TypeVar("Example")
Batch = TypeVar("Batch")


class FitProgress:
    """Steps done, loss and evaluation, on one line of stderr or in the notebook's cell."""

    def __init__(self, *, total: int, done: int, show: bool) -> None:
        from tqdm.auto import tqdm

        # None: only where stderr is a terminal.
        self._bar: Any = tqdm(
            total=total, initial=min(done, total), unit="step", disable=None if show else True
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def stepped(self, report: StepReport) -> None:
        self._show("loss", report.loss)
        self._bar.update()

    def evaluated(self, evaluation: Evaluation) -> None:
        for name, value in evaluation.values.items():
            self._show(f"eval {name}", value)

    def _show(self, name: str, value: float) -> None:
        self._shown[name] = f"{value:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)


@attrs.frozen
class FitReport:
    """How a run went, its parts before a checkpoint included."""

    steps: int
    epochs: float
    """How often the data was gone through, the begun epoch as a fraction."""
    losses: tuple[float, ...]
    """Of each step."""
    evaluations: tuple[Evaluation, ...]
    best: Evaluation | None
    """By the loss, or `EarlyStop.metric`; None without evaluations."""
    stopped_early: bool


@attrs.define
class _Position:
    """Where a run is: all of it that is not tensors."""

    epoch: int = 0
    group: int = 0
    """Steps taken in this epoch."""
    step: int = 0
    evaluated: int = 0
    """The step after which the last evaluation was."""
    best: int = -1
    """Index of the best evaluation."""
    worse: int = 0
    """Evaluations since."""


class FitRun(Generic[Example, Batch]):
    """What `swarmcore.training.fit` runs."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Example],
        collate: Callable[[list[Example]], Batch],
        loss: Callable[[nn.Module, Batch], torch.Tensor],
        metrics: Callable[[nn.Module, Batch], Mapping[str, Any]] | None,
        evaluation: Sequence[Example] | None,
        settings: FitSettings,
    ) -> None:
        _check_data(data, "train")
        if evaluation is not None:
            _check_data(evaluation, "evaluate")
        if evaluation is None and (settings.early_stop or settings.keep_best or metrics):
            raise InputError("metrics, early_stop and keep_best need data to evaluate on: pass evaluation=")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("the model has no trainable parameters: nothing in it has requires_grad")
        self._order = functools.lru_cache(maxsize=1)(lambda epoch: settings.order(epoch, len(data)))
        self.model, self.data, self.evaluation, self.settings = model, data, evaluation, settings
        self._collate, self._loss, self._metrics = collate, loss, metrics
        self._optimizer = settings.optimizer or torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=0.0
        )
        known = set(self.parameters.values())
        if not all(p in known for group in self._optimizer.param_groups for p in group["params"]):
            raise InputError(
                "the optimizer has parameters that are not trainable ones of the model, and would be missing "
                "from checkpoints; make them a part of the model"
            )
        device = next(iter(self.parameters.values())).device.type
        self._device = device
        self._scaler = torch.amp.GradScaler(device, enabled=settings.precision == "float16")
        self._group = settings.batch_size * settings.accumulate
        self._groups = math.ceil(len(data) / self._group)
        self._position = _Position()
        self._losses: list[float] = []
        self._evaluations: list[Evaluation] = []
        self._best: dict[str, torch.Tensor] = {}
        """Parameters of the best evaluation, where they are to be kept."""
        self._updating = False
        self._marked: dict[str, Any] = {}
        if settings.resume and settings.checkpoint and (state := read_checkpoint(settings.checkpoint)):
            self._restore(state)
        self._mark()

    @property
    def total_steps(self) -> int:
        steps = self.settings.epochs * self._groups
        return min(steps, self.settings.max_steps or steps)

    @property
    def step(self) -> int:
        """Steps taken, those before a checkpoint included."""
        return self._position.step

    def units(self, progress: FitProgress, whole: AbstractContextManager[object]) -> Iterator[None]:
        """Do the work; one unit is done whenever it yields. ``whole`` is entered while it must not be
        interrupted."""
        while True:
            if self._evaluation_is_due():
                yield from self._evaluate(progress, whole)
            elif self._is_done():
                break
            else:
                yield from self._step(progress, whole)
                if self._position.step % self.settings.checkpoint_every == 0:
                    self.save()
        self.save()
        if self.settings.keep_best and self._best:
            self._updating = True  # these are not the parameters to go on with
            restore_tensors("parameters", self._best, dict(self.parameters))

    def save(self) -> None:
        """Write the checkpoint, if there is to be one, unless parameters are not of a whole step."""
        if self.settings.checkpoint is None or self._updating:
            return
        state = {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self.settings.scheduler.state_dict() if self.settings.scheduler else None,
            "scaler": self._scaler.state_dict(),
            "best": self._best,
            "losses": self._losses,
            "evaluations": [[evaluation.step, evaluation.values] for evaluation in self._evaluations],
            "settings": self._identity(),
            **self._marked,
        }
        write_checkpoint(self.settings.checkpoint, state)

    def report(self) -> FitReport:
        at = self._position
        return FitReport(
            steps=at.step,
            epochs=at.epoch + at.group / self._groups,
            losses=tuple(self._losses),
            evaluations=tuple(self._evaluations),
            best=self._evaluations[at.best] if at.best >= 0 else None,
            stopped_early=self._has_stopped_early(),
        )

    def _step(self, progress: FitProgress, whole: AbstractContextManager[object]) -> Iterator[None]:
        at, settings = self._position, self.settings
        indices = self._order(at.epoch)[at.group * self._group : (at.group + 1) * self._group]
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for first in range(0, len(indices), settings.batch_size):
            part = indices[first : first + settings.batch_size]
            loss = self._loss_of(self._collate([self.data[index] for index in part]))
            if not loss.requires_grad:
                raise InputError("the loss does not depend on any trainable parameter of the model")
            share = len(part) / len(indices)
            torch.autograd.backward(self._scaler.scale(loss * share))
            mean += loss.item() * share
            yield
        report = StepReport(
            step=at.step + 1,
            epoch=at.epoch,
            loss=mean,
            gradient_norm=self._finish_gradients(at.step + 1),
            learning_rate=float(self._optimizer.param_groups[0]["lr"]),
        )
        with whole:
            self._updating = True
            self._scaler.step(self._optimizer)
            self._scaler.update()
            if settings.scheduler is not None:
                settings.scheduler.step()
            at.step, at.group = at.step + 1, at.group + 1
            if at.group == self._groups:
                at.epoch, at.group = at.epoch + 1, 0
            self._losses.append(mean)
            self._mark()
            self._updating = False
        progress.stepped(report)
        if settings.on_step is not None:
            settings.on_step(report)

    def _finish_gradients(self, step: int) -> float:
        """Check and clip them; return their norm before that."""
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = get_total_norm(gradients)
        # A scaler skips steps whose gradients overflowed, and goes on with a smaller scale.
        if not torch.isfinite(norm) and not self._scaler.is_enabled():
            raise InvalidBatchError(
                f"the gradients of step {step} are not finite; use a smaller learning rate, clip_norm, or "
                f"more precision"
            )
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), self.settings.clip_norm, norm)
        return float(norm)

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            loss = self._loss(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InputError("the loss function must return a tensor with one number: the mean of the batch")
        if not torch.isfinite(loss):
            raise InvalidBatchError(
                f"the loss after step {self._position.step} is {loss.item()}; use a smaller learning rate, "
                f"clip_norm, or look at the data"
            )
        return loss.reshape(())

    def _evaluate(self, progress: FitProgress, whole: AbstractContextManager[object]) -> Iterator[None]:
        data, size = self.evaluation or (), self.settings.batch_size
        self.model.eval()
        sums: dict[str, float] = {}
        for first in range(0, len(data), size):
            examples = [data[index] for index in range(first, min(first + size, len(data)))]
            values = self._evaluate_batch(examples)
            if first and values.keys() != sums.keys():
                raise InputError("the metrics function must return the same names for every batch")
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(examples)
            yield
        evaluation = Evaluation(
            self._position.step, {name: value / len(data) for name, value in sums.items()}
        )
        judge = self.settings.judge
        if judge.metric not in evaluation.values:
            raise InputError(
                f"there is no metric {judge.metric!r} to judge by; there are {', '.join(evaluation.values)}"
            )
        with whole:
            self._updating = True
            self._judge(evaluation)
            self._mark()
            self._updating = False
        progress.evaluated(evaluation)
        if self.settings.on_evaluation is not None:
            self.settings.on_evaluation(evaluation)

    @torch.no_grad()
    def _evaluate_batch(self, examples: list[Example]) -> dict[str, float]:
        batch = self._collate(examples)
        values = {"loss": self._loss_of(batch).item()}
        if self._metrics is not None:
            with self._autocast():
                found = self._metrics(self.model, batch)
            values |= {name: float(value) for name, value in found.items()}
        return values

    def _judge(self, evaluation: Evaluation) -> None:
        at, judge = self._position, self.settings.judge
        best = self._evaluations[at.best].values.get(judge.metric) if at.best >= 0 else None
        at.worse += 1
        if judge.improves(evaluation.values[judge.metric], best):
            at.best, at.worse = len(self._evaluations), 0
            if self.settings.keep_best:
                self._best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._evaluations.append(evaluation)
        at.evaluated = at.step

    def _evaluation_is_due(self) -> bool:
        at, every = self._position, self.settings.evaluate_every
        if self.evaluation is None or at.evaluated == at.step:
            return False
        return self._is_done() or (at.step % every == 0 if every else at.group == 0)

    def _is_done(self) -> bool:
        return self._position.step >= self.total_steps or self._has_stopped_early()

    def _has_stopped_early(self) -> bool:
        stop = self.settings.early_stop
        return stop is not None and self._position.worse >= stop.patience

    def _mark(self) -> None:
        """Note what a checkpoint of this moment needs besides the parameters and their optimiser."""
        if self.settings.checkpoint is not None:
            self._marked = {
                "position": attrs.asdict(self._position),
                "random": random_states(),
                "buffers": buffers_of(self.model),
            }

    def _identity(self) -> dict[str, Any]:
        """What must not change from a run to its continuation."""
        settings = self.settings
        return {
            "examples": len(self.data),
            "batch_size": settings.batch_size,
            "accumulate": settings.accumulate,
            "shuffle": settings.shuffle,
            "seed": settings.seed,
            "precision": settings.precision,
            "optimizer": type(self._optimizer).__name__,
            "scheduler": type(settings.scheduler).__name__ if settings.scheduler else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        path, mine = self.settings.checkpoint, self._identity()
        differing = [name for name, value in mine.items() if state["settings"].get(name) != value]
        if differing:
            name = differing[0]
            raise InputError(
                f"{path} is of a run with {name} {state['settings'].get(name)}, not {mine[name]}; pass the "
                f"same, another file, or resume=False"
            )
        restore_tensors("parameters", state["parameters"], dict(self.parameters))
        restore_tensors("buffers", state["buffers"], live_buffers(self.model))
        try:
            self._optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as exc:
            raise InputError(f"{path} is of a run with other parameters in its optimizer: {exc}") from exc
        if self.settings.scheduler is not None:
            self.settings.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self._position = _Position(**state["position"])
        self._losses = list(state["losses"])
        self._evaluations = [Evaluation(step, values) for step, values in state["evaluations"]]
        self._best = {name: value.to(self._device) for name, value in state["best"].items()}
        restore_random_states(state["random"])

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.dtype
        return torch.autocast(self._device, dtype=dtype, enabled=dtype != torch.float32)


def _check_data(data: object, purpose: str) -> None:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError(
            f"the data to {purpose} on must have a length and an index, to be shuffled and gone on with "
            f"where it was left, got {type(data).__name__}; make a list of it"
        )
    if not len(data):
        raise InputError(f"there is no data to {purpose} on")
