"""The bar of a run."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from swarmcore.training.fit_settings import Evaluation, StepReport


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
