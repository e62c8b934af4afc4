"""The training loop in three functions (after Redco, arXiv 2310.16355): collate, loss, and metrics."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, TypeVar, Unpack

import torch
from torch import nn

from swarmcore.errors import SwarmError
from swarmcore.training.fit_run import FitProgress, FitReport, FitRun
from swarmcore.training.fit_settings import FitOptions, FitSettings

Example = TypeVar("Example")
Batch = TypeVar("Batch")
Result = TypeVar("Result")

Collate = Callable[[list[Example]], Batch]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
Metrics = Callable[[nn.Module, Batch], Mapping[str, Any]]


async def fit(
    model: nn.Module,
    data: Sequence[Example],
    collate: Collate[Example, Batch],
    loss: Loss[Batch],
    metrics: Metrics[Batch] | None = None,
    *,
    evaluation: Sequence[Example] | None = None,
    **options: Unpack[FitOptions],
) -> FitReport:
    """Train whatever in ``model`` has ``requires_grad``; the rest of it may be on servers.

    ``collate`` makes a batch of a list of examples of ``data``, ``loss`` computes one number for it: the mean
    over its examples. ``metrics`` gives further numbers for a batch of ``evaluation``; what is reported are
    means over all its examples. ``options`` are the fields of `FitSettings`: ``epochs``, ``batch_size``,
    ``accumulate``, ``optimizer``, ``clip_norm``, ``precision``, ``evaluate_every``, ``early_stop``,
    ``checkpoint`` and more.

    The functions are called in one other thread, so that the event loop is free for the blocks on servers,
    which may be reached over the same loop. With a ``checkpoint``, a run that was stopped, in any way and at
    any moment, goes on when it is called again, and ends with the same bits as if it had not been stopped.
    When cancelled, it waits for the micro-batch under way, writes the checkpoint, and is gone.

    Raise `InputError` for settings and functions that do not work, `InvalidBatchError` when the loss or the
    gradients are no longer finite, `CheckpointError` and `StorageError` for the file, and what ``model``
    raises; the checkpoint is then of the last whole step.
    """
    settings = FitSettings(**options)
    training = model.training
    thread = _Thread()
    try:
        run = await thread.run(
            functools.partial(FitRun, model, data, collate, loss, metrics, evaluation, settings)
        )
        try:
            with FitProgress(total=run.total_steps, done=run.step, show=settings.progress) as progress:
                units = run.units(progress, nullcontext())
                while await thread.run(functools.partial(next, units, True)) is None:
                    pass
        except BaseException as exc:
            if not thread.is_busy:
                await thread.run(functools.partial(_save_checkpoint, run, exc))
            raise
        return run.report()
    finally:
        thread.close()
        model.train(training)


def fit_sync(
    model: nn.Module,
    data: Sequence[Example],
    collate: Collate[Example, Batch],
    loss: Loss[Batch],
    metrics: Metrics[Batch] | None = None,
    *,
    evaluation: Sequence[Example] | None = None,
    **options: Unpack[FitOptions],
) -> FitReport:
    """`fit` without asyncio, in the calling thread. Ctrl-C stops it at once, with its checkpoint written."""
    settings = FitSettings(**options)
    training = model.training
    try:
        run = FitRun(model, data, collate, loss, metrics, evaluation, settings)
        try:
            with FitProgress(total=run.total_steps, done=run.step, show=settings.progress) as progress:
                for _ in run.units(progress, _Uninterrupted()):
                    pass
        except BaseException as exc:
            _save_checkpoint(run, exc)
            raise
        return run.report()
    finally:
        model.train(training)


def _save_checkpoint(run: FitRun[Example, Batch], stopped_by: BaseException) -> None:
    """Write the checkpoint; where that fails too, say so in what stopped the run."""
    try:
        run.save()
    except SwarmError as exc:
        stopped_by.add_note(f"its checkpoint could not be written either: {exc}")


class _Thread:
    """One other thread, whose work an event loop waits for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fit")
        self._work: asyncio.Future[Any] | None = None

    @property
    def is_busy(self) -> bool:
        return self._work is not None and not self._work.done()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Wait for ``work``, and when cancelled as well: nothing can stop it. A second time it is left."""
        self._work = future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # it has been looked at
            raise

    def close(self) -> None:
        self._executor.shutdown(wait=False)


class _Uninterrupted(AbstractContextManager[None]):
    """Within it, Ctrl-C waits for its end. Only the main thread is interrupted at all."""

    def __enter__(self) -> None:
        self._received: FrameType | None = None
        self._number = 0
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._receive)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._number and callable(self._handler):
            self._handler(self._number, self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._number, self._received = number, frame
