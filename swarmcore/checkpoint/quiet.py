"""transformers' own progress bars and warnings, silenced while it converts, and turned into our progress."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Lock
from typing import Any

_LEGACY_READER = "transformers.modeling_gguf_pytorch_utils"
_one_at_a_time = Lock()


class _Bar:
    """Stands in for tqdm: draws nothing, reports the share that is done."""

    def __init__(
        self, items: Iterable[Any] | None, total: int | None, report: Callable[[float], None]
    ) -> None:
        self._items: Iterable[Any] = items if items is not None else ()
        self._total = total or (len(items) if isinstance(items, Sized) else 0)
        self._done, self._report = 0, report

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        if self._total:
            self._report(min(1.0, self._done / self._total))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # set_description, close, refresh, …


@contextmanager
def quiet_transformers(report: Callable[[float], None]) -> Iterator[None]:
    """Within it, transformers logs errors only, and its progress bars call ``report(share done)`` instead.

    transformers' logging is global to the process: other threads' bars are silent meanwhile, too.
    """
    from transformers import logging

    stages = 0

    def bar(items: Iterable[Any] | None = None, *args: Any, total: int | None = None, **kwargs: Any) -> _Bar:
        nonlocal stages
        stages += 1
        first = stages == 1  # dequantizing; loading and saving, which follow, take a moment
        return _Bar(items, total, lambda share: report(share * 0.9 if first else 0.9 + share * 0.1))

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return bar(*args, **kwargs)

    with _one_at_a_time:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        set_hook = getattr(logging, "set_tqdm_hook", None)
        before = set_hook(hook) if set_hook else None
        reader: Any = importlib.import_module(_LEGACY_READER) if find_spec(_LEGACY_READER) else None
        drawn = getattr(reader, "tqdm", None)
        if drawn is not None:  # this one module asks tqdm itself, past the hook
            reader.tqdm = bar
        try:
            yield
        finally:
            if drawn is not None:
                reader.tqdm = drawn
            if set_hook:
                set_hook(before)
            logging.set_verbosity(verbosity)
