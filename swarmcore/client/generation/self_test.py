"""The numeric self-test of the client's part: embeddings and logits are those of the family's whole model.

As `swarmcore.executor.torch.self_test` does it for blocks, on a small random model of the same config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from swarmcore.checkpoint import Checkpoint
from swarmcore.executor.torch.reference import Reference
from swarmcore.executor.torch.self_test import check, compare


class Parts(Protocol):
    """The client's part of a model, as far as it is tested."""

    def embed(self, ids: list[int], positions: range) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def check_parts(checkpoint: Checkpoint, load: Callable[[Checkpoint], Parts]) -> None:
    """Raise `UnsupportedModelError` when the client's part, as ``load`` makes it, computes anything else.

    ``load`` is given a small checkpoint of the same kind, to be loaded in float32. Returns at once when this
    test has been passed before.
    """

    def test(reference: Reference) -> str | None:
        return _difference(reference, load(reference))

    check(checkpoint, "embeddings and logits", test)


def _difference(reference: Reference, parts: Parts) -> str | None:
    for ids, hidden, logits in zip(reference.ids, reference.hidden, reference.logits, strict=True):
        if found := compare(parts.embed(ids.tolist(), range(len(ids))), hidden[0]):
            return f"what goes into the first block is off by {found}"
        if found := compare(parts.logits(hidden[-1]), logits):
            return f"logits are off by {found}"
    return None
