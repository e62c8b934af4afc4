"""What torch raises when memory runs out, as one error."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swarmcore.errors import InputError, ServerMemoryError, SwarmError

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
"""In the message of a ``RuntimeError``, by which torch tells of it on CPUs and in some libraries of GPUs."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether ``exc`` is one of the errors that Python and torch raise when memory runs out."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exc, RuntimeError) and _NO_MEMORY.search(str(exc)) is not None


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Raise `ServerMemoryError` when memory runs out within it; what ``what`` had allocated is let go."""
    with _out_of_memory_as(
        ServerMemoryError,
        f"the server ran out of memory in {what}; send smaller micro-batches or steps, or use another server",
    ):
        yield


@contextmanager
def loading_memory(name: str) -> Iterator[None]:
    """Raise `InputError` when memory runs out while the model ``name`` is loaded within it."""
    with _out_of_memory_as(
        InputError,
        f"memory ran out while {name} was loaded; free some, hold fewer blocks, or ask for a smaller dtype",
    ):
        yield


@contextmanager
def _out_of_memory_as(error: type[SwarmError], message: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        # The error outlives this call, and with its traceback every tensor that was a local variable.
        traceback.clear_frames(exc.__traceback__)
        raise error(message) from exc
