"""Loading blocks sets torch's default dtype for the whole process; steps that run meanwhile do not care."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


@pytest.mark.parametrize("family", FAMILIES)
async def test_steps_give_the_same_at_any_default_dtype(family: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    span = Span(0, checkpoint.info.blocks)
    hidden = torch.randn(60, 64, generator=torch.Generator().manual_seed(3))
    outputs = []
    for default in (torch.float32, torch.bfloat16):
        executor = TorchExecutor.load(checkpoint, span, dtype="bfloat16", threads=1)
        executor.reserve(SequenceId(0), 64)
        torch.set_default_dtype(default)
        try:
            for start, count in ((0, 40), (40, 1), (41, 19)):
                segment = Segment(SequenceId(0), start, count)
                rows = to_wire("hidden", hidden[start : start + count].clone())
                [result] = await executor.step([ScheduledChunk(rows, 0, executor.span, (segment,))])
                assert isinstance(result, Tensor), result
                outputs.append(to_torch(result))
        finally:
            torch.set_default_dtype(torch.float32)
        await executor.close()
    for one, other in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(one, other)
