"""Progress in notebooks, where loading a model would be minutes of silence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def notebook_progress() -> Callable[[str, int, int], None] | None:
    """Bars of tqdm, in a notebook that has it; None elsewhere: there, programs show progress as they like."""
    if "ipykernel" not in sys.modules:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return TqdmProgress(tqdm)


class TqdmProgress:
    """A bar for each piece of work, closed when it is done; one of unknown size when the next begins."""

    def __init__(self, tqdm: Callable[..., Any]) -> None:
        self._tqdm = tqdm
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        bar = self._bars.get(what)
        if bar is None:
            for name in [name for name, other in self._bars.items() if not other.total]:
                self._bars.pop(name).close()
            bar = self._bars[what] = self._tqdm(
                desc=what, total=total or None, unit="B", unit_scale=True, unit_divisor=1000
            )
        bar.total = total or None
        bar.update(done - bar.n)
        if total and done >= total:
            self._bars.pop(what).close()
