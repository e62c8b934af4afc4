"""bitsandbytes, as far as it is used: operators that it registers with torch, and one table."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from swarmcore.distribution import install_command
from swarmcore.errors import MissingExtraError


class Bitsandbytes:
    """What of that library is used: operators that it registers with torch, and one table."""

    KIND = "nf4"

    def __init__(self) -> None:
        try:
            with _without_code_from_a_hub(), _without_a_compiler():
                functional = importlib.import_module("bitsandbytes.functional")
        except ImportError as exc:
            raise MissingExtraError(f"nf4 weights need bitsandbytes: {install_command('quant')}") from exc
        self.operators = torch.ops.bitsandbytes
        self.code: torch.Tensor = functional.get_4bit_type(self.KIND, device="cpu")
        self.cpu_kernel = bool(getattr(functional, "has_avx512bf16", bool)())


@contextmanager
def _without_code_from_a_hub() -> Iterator[None]:
    """Hide a package by which bitsandbytes would download a kernel, and run it, as it is imported.

    It has another of its own, and says so in a warning.
    """
    logger, hidden = logging.getLogger("bitsandbytes.backends.cpu.ops"), "kernels" not in sys.modules
    before = logger.level
    logger.setLevel(logging.ERROR)
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(before)
        if hidden:
            del sys.modules["kernels"]


@contextmanager
def _without_a_compiler() -> Iterator[None]:
    """Leave functions as they are that bitsandbytes would have torch compile.

    They are for optimizers and for devices without kernels of its own, and torch's compiler takes 45 MB as
    soon as one of them is marked.
    """
    compiling = torch.compile
    torch.compile = _plain  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


def _plain(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``torch.compile`` as a decorator, with options or without, that compiles nothing."""
    return function or _plain


bitsandbytes = functools.cache(Bitsandbytes)
"""The library, imported when it is first needed."""
