"""What torch raises when memory runs out, as one error."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swarmcore.errors import ServerMemoryError

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
"""In the message of a ``RuntimeError``, by which torch tells of it on CPUs and in some libraries of GPUs."""


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Raise `ServerMemoryError` when memory runs out within it; what ``what`` had allocated is let go."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        if not isinstance(exc, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(exc)):
            raise
        # The error outlives this call, and with its traceback every tensor that was a local variable.
        traceback.clear_frames(exc.__traceback__)
        raise ServerMemoryError(
            f"the server ran out of memory in {what}; send smaller micro-batches, or use another server"
        ) from exc
