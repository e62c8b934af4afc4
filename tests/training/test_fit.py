"""The training loop: what a step is, and that a run which was stopped ends as one that was not."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
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
    raise_stop,
    state_of,
    tiny_model,
    whole_run,
)
from torch import nn
from torch.nn import functional

from swarmcore.training import EarlyStop, FitReport, FitSettings, fit, fit_sync
from swarmcore.training.fit_checkpoint import read_checkpoint
from swarmcore.training.fit_run import FitProgress, FitRun


def test_a_run_stopped_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected = whole_run()
    assert (expected[1].steps, expected[1].epochs, len(expected[1].evaluations)) == (8, 2.0, 3)
    counter = StopAt(0, raise_stop)
    model = tiny_model()
    fit_sync(model, DATA, collate, counter, **options(model))
    for call in range(1, counter.calls + 1):  # within steps and evaluations, and between them
        file, model = tmp_path / f"{call}.pt", tiny_model()
        with pytest.raises(Stop):
            fit_sync(model, DATA, collate, StopAt(call, raise_stop), **options(model, checkpoint=file))
        torch.manual_seed(call)
        random.seed(call)
        model = tiny_model()
        report = fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file))
        assert state_of(model, report) == expected, f"stopped in call {call}"


async def test_a_cancelled_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected, file, model = whole_run(), tmp_path / "run.pt", tiny_model()
    loop = asyncio.get_running_loop()
    stopping = StopAt(7, lambda: loop.call_soon_threadsafe(task.cancel))
    task = asyncio.create_task(fit(model, DATA, collate, stopping, **options(model, checkpoint=file)))
    with pytest.raises(asyncio.CancelledError):
        await task
    model = tiny_model()
    report = await fit(model, DATA, collate, loss, **options(model, checkpoint=file))
    assert state_of(model, report) == expected
    assert not model.training


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has its programs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("where", ["loss", "optimizer", "on_step"])
def test_ctrl_c_leaves_a_checkpoint(where: str, tmp_path: Path) -> None:
    expected, file, model = whole_run(), tmp_path / "run.pt", tiny_model()
    chosen = options(model, checkpoint=file)
    interrupt = StopAt(6, lambda: signal.raise_signal(signal.SIGINT))
    if where == "optimizer":
        chosen["optimizer"].register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    elif where == "on_step":
        chosen["on_step"] = lambda report: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_sync(model, DATA, collate, interrupt if where == "loss" else loss, **chosen)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(tmp_path.iterdir()) == [file]
    model = tiny_model()
    report = fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file))
    assert state_of(model, report) == expected


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_leaves_a_checkpoint_of_an_awaited_run(tmp_path: Path) -> None:
    expected, file, model = whole_run(), tmp_path / "run.pt", tiny_model()
    main = threading.main_thread().ident
    assert main is not None
    stopping = StopAt(8, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(fit(model, DATA, collate, stopping, **options(model, checkpoint=file)))  # type: ignore[arg-type]
    assert stopping.calls < 20
    model = tiny_model()
    report = fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file))
    assert state_of(model, report) == expected


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    expected, file, copy = whole_run(), tmp_path / "run.pt", tmp_path / "copy.pt"

    def keep(report: Any) -> None:
        if report.step == 5:  # step 4 was written, 5 would be lost
            shutil.copy(file, copy)

    model = tiny_model()
    fit_sync(model, DATA, collate, loss, **options(model, checkpoint=file, checkpoint_every=2, on_step=keep))
    model = tiny_model()
    steps: list[int] = []
    chosen = options(model, checkpoint=copy, on_step=lambda report: steps.append(report.step))
    assert state_of(model, fit_sync(model, DATA, collate, loss, **chosen)) == expected
    assert steps == [5, 6, 7, 8]


async def test_a_finished_run_is_not_run_again_but_can_be_made_longer(tmp_path: Path) -> None:
    file, model = tmp_path / "run.pt", tiny_model()
    report = await fit(model, DATA, collate, loss, **options(model, checkpoint=file, epochs=1))
    model = tiny_model()
    again = await fit(model, DATA, collate, raise_stop, **options(model, checkpoint=file, epochs=1))  # type: ignore[arg-type]
    assert again == report
    longer = await fit(model, DATA, collate, loss, **options(model, checkpoint=file))
    assert longer.losses[:4] == report.losses
    assert longer.steps == 8


def test_the_loop_is_free_while_a_batch_is_computed() -> None:
    """As the remote blocks of a model need it, which are reached over the same event loop."""

    async def main() -> FitReport:
        loop = asyncio.get_running_loop()

        async def answer() -> float:
            return 2.0

        def remote_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            factor = asyncio.run_coroutine_threadsafe(answer(), loop).result(timeout=10)
            return loss(model, batch) * factor

        return await fit(tiny_model(), DATA, collate, remote_loss, max_steps=2)

    assert asyncio.run(main()).steps == 2


def plain_run(model: nn.Module, **chosen: Any) -> FitReport:
    def plain_collate(examples: list[tuple[torch.Tensor, int]]) -> Batch:
        inputs, labels = zip(*examples, strict=True)
        return torch.stack(inputs), torch.tensor(labels)

    return fit_sync(model, DATA, plain_collate, loss, **chosen)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    one, many = linear(), linear()
    plain_run(one, batch_size=8, epochs=2)
    plain_run(many, batch_size=3, accumulate=3, epochs=2)  # groups of 9 in place of 8
    assert not torch.allclose(one.weight, many.weight, atol=1e-4)  # type: ignore[arg-type]
    one, many = linear(), linear()
    whole, parts = (
        plain_run(one, batch_size=12, epochs=2),
        plain_run(many, batch_size=3, accumulate=4, epochs=2),
    )
    torch.testing.assert_close(one.state_dict(), many.state_dict())
    assert whole.losses == pytest.approx(parts.losses)


def test_gradients_are_clipped_and_their_norm_reported() -> None:
    model, norms = linear(), []
    before = [p.detach().clone() for p in model.parameters()]
    plain_run(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        clip_norm=0.01,
        max_steps=1,
        on_step=lambda report: norms.append(report.gradient_norm),
    )
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert norms[0] > 0.1


def test_local_parts_compute_in_less_precision_where_asked() -> None:
    seen = []

    def spying_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits = model(batch[0])
        seen.append(logits.dtype)
        return functional.cross_entropy(logits.float(), batch[1])

    model = linear()
    fit_sync(model, DATA, collate, spying_loss, max_steps=1, precision="bfloat16")
    assert seen == [torch.bfloat16]
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("keep_best", [False, True])
def test_it_ends_early_when_evaluations_get_no_better(keep_best: bool) -> None:
    model, values, seen = linear(), iter([0.2, 0.5, 0.4, 0.5, 0.9]), []

    def score(model: nn.Module, batch: Batch) -> dict[str, float]:
        seen.append(model.get_parameter("weight").clone())
        return {"score": next(values)}

    report = plain_run(
        model,
        epochs=10,
        evaluation=HELD_OUT,
        metrics=score,
        evaluate_every=2,
        early_stop=EarlyStop("score", patience=2, larger_is_better=True),
        keep_best=keep_best,
    )
    assert report.stopped_early
    assert report.steps == 8
    assert report.best is not None
    assert (report.best.step, report.best.values["score"]) == (4, 0.5)
    assert torch.equal(model.get_parameter("weight"), seen[1 if keep_best else 3])


def test_the_best_parameters_are_not_those_to_go_on_with(tmp_path: Path) -> None:
    """Not even when a run is stopped at its very end."""
    model, scores = linear(), iter([1.0, 0.0])
    settings = FitSettings(
        checkpoint=tmp_path / "run.pt",
        epochs=2,
        early_stop=EarlyStop("score", larger_is_better=True),
        keep_best=True,
    )
    run = FitRun(model, DATA, collate, loss, lambda *_: {"score": next(scores)}, HELD_OUT, settings)
    with FitProgress(total=run.total_steps, done=0, show=False) as progress:
        for _ in run.units(progress, nullcontext()):
            last = model.get_parameter("weight").clone()
    run.save()
    state = read_checkpoint(tmp_path / "run.pt")
    assert state is not None
    assert torch.equal(state["parameters"]["weight"], last)
    assert torch.equal(state["best"]["weight"], model.get_parameter("weight"))
    assert not torch.equal(last, model.get_parameter("weight"))


def test_metrics_are_means_over_examples() -> None:
    def size(model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"size": float(len(batch[1]))}

    report = plain_run(linear(), evaluation=HELD_OUT, metrics=size, batch_size=3)
    assert report.evaluations[-1].values["size"] == pytest.approx((3 * 3 + 2 * 2) / 5)


def test_every_epoch_takes_all_data_in_another_order() -> None:
    seen: list[int] = []

    def note(examples: list[int]) -> torch.Tensor:
        seen.extend(examples)
        return torch.zeros(1, 4)

    def flat(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum()

    fit_sync(linear(), range(10), note, flat, batch_size=4, epochs=2)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    seen.clear()
    fit_sync(linear(), range(10), note, flat, batch_size=4, shuffle=False)
    assert seen == list(range(10))
