"""What blocks are estimated to need, against blocks that are loaded."""

from pathlib import Path

import attrs
import pytest
import torch
from tiny_models import FAMILIES, save_random_model, tiny_config

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.errors import InputError
from swarmcore.executor.torch.loader import block_needs, device_name, free_memory
from swarmcore.executor.torch.span import load_span
from swarmcore.types import Span


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_hold_for_blocks_that_are_loaded(family: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    needs, small = (
        block_needs(checkpoint, dtype="float32", device="cpu", batch_tokens=8, cache_dtype=cache_dtype)
        for cache_dtype in ("auto", "int8")
    )
    blocks = checkpoint.info.blocks
    model = load_span(checkpoint, Span(0, blocks), dtype=torch.float32, device=torch.device("cpu"))
    for index in range(blocks):
        cache = model.layout.part(index, index + 1).bytes_per_token
        assert cache <= needs.cache_per_token <= 4 * cache
        quantised = attrs.evolve(model.layout.part(index, index + 1), quantised=True).bytes_per_token
        assert quantised <= small.cache_per_token <= 4 * quantised
    assert needs.weights == max(
        sum(parameter.nbytes for parameter in model.block(index).parameters()) for index in range(blocks)
    )


def test_half_the_precision_is_half_the_memory(tiny_llama: Checkpoint) -> None:
    wide, narrow = (
        block_needs(tiny_llama, dtype=dtype, device="cpu", batch_tokens=8) for dtype in ("float32", "float16")
    )
    assert wide.weights == 2 * narrow.weights
    assert wide.cache_per_token == 2 * narrow.cache_per_token
    assert wide.reading == narrow.reading, "what is read is as the checkpoint has it"
    with pytest.raises(InputError, match="float8"):
        block_needs(tiny_llama, dtype="float8", device="cpu", batch_tokens=8)
    with pytest.raises(InputError, match="int7"):
        block_needs(tiny_llama, dtype="auto", device="cpu", batch_tokens=8, cache_dtype="int7")


def test_this_machine_has_a_name_and_memory() -> None:
    assert device_name("cpu")
    assert 2**20 < free_memory("cpu") < 2**50
