"""Hidden states through an executor: rows in, rows out, as arrays."""

from __future__ import annotations

from typing import Literal

import numpy as np

from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.ggml.arrays import to_rows, to_tensor
from swarmcore.types import Span


async def through(
    executor: BlockExecutor,
    rows: np.ndarray,
    sequence: int = 0,
    *,
    start: int = 0,
    span: Span | None = None,
    reply: Literal["all", "last"] = "all",
) -> np.ndarray:
    executor.reserve(SequenceId(sequence), -(-(start + len(rows)) // executor.page) * executor.page)
    segments = (Segment(SequenceId(sequence), start, len(rows)),)
    hidden = to_tensor("hidden", rows, "float32")
    [result] = await executor.step([ScheduledChunk(hidden, 0, span or executor.span, segments, reply)])
    if isinstance(result, Exception):
        raise result
    return to_rows(result)
