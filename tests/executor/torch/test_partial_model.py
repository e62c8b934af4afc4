"""A lack of memory while a model is loaded is told as what it is."""

from __future__ import annotations

import pytest
import torch

from swarmcore.errors import CheckpointError, InputError
from swarmcore.executor.torch.device import loading_memory
from swarmcore.executor.torch.partial_model import load_state


def load(error: Exception) -> None:
    class Failing:
        @staticmethod
        def from_pretrained(*arguments: object, **options: object) -> None:
            raise error

    with loading_memory("big"):
        load_state(Failing, None, {}, torch.float32, "big")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_no_damaged_checkpoint(error: Exception) -> None:
    with pytest.raises(InputError, match=r"memory ran out while big was loaded; .*hold fewer blocks") as told:
        load(error)
    assert not isinstance(told.value, CheckpointError)


def test_what_the_family_refuses_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="the tensors of big do not fit its config: no such head"):
        load(RuntimeError("no such head"))
    with pytest.raises(RuntimeError, match="anything else"), loading_memory("big"):
        raise RuntimeError("anything else")
