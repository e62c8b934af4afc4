"""Some sequences of a batch, forward through the blocks and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from swarmcore.executor.torch.adapters import TorchAdapter
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.lora import OneAdapter
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.types import Span


class _Stage(NamedTuple):
    """One block's part of the graph, which begins anew with every block."""

    block: int
    inputs: torch.Tensor
    outputs: torch.Tensor


class Microbatch:
    """Goes through one block after the other, then back. All in the compute thread."""

    def __init__(
        self,
        first_row: int,
        lengths: Sequence[int],
        hidden: torch.Tensor,
        span: Span,
        adapter: TorchAdapter | None,
        *,
        graph: bool,
        padding: bool = False,
    ) -> None:
        """``hidden`` is ``[tokens, hidden size]``; with ``graph`` it can go back as well. ``padding`` as of
        `TrainingBatch`."""
        self.tokens = sum(lengths)
        self.rows = slice(first_row, first_row + self.tokens)
        self.hidden = hidden
        """As the last block left it, without a graph."""
        self.gradient = torch.Tensor()
        """Of what the last block on the way back has for inputs; to be set before the first one."""
        self._span, self._next = span, span.start
        self._graph = graph
        self._stages: list[_Stage] = []
        self._adapter = adapter
        self._weights: dict[str, torch.Tensor] = {}
        if adapter is None:
            self._batch = UncachedBatch(lengths, hidden.device, padding=padding)
            return
        # Leaves of this microbatch's own, whatever else uses the adapter.
        self._weights = {
            name: weight.detach().requires_grad_(graph) for name, weight in adapter.weights_in(span).items()
        }
        self._batch = UncachedBatch(
            lengths,
            hidden.device,
            updates=OneAdapter(self._weights, adapter.scaling) if adapter.targets else None,
            prefixes={
                block: self._weights[name] for block, name in adapter.prefixes.items() if block in span
            },
            prefix_tokens=adapter.prefix_tokens,
            padding=padding,
        )

    @property
    def through(self) -> bool:
        return self._next == self._span.end

    def forward(self, loaded: LoadedBlocks, blocks: int) -> None:
        """The next ``blocks`` blocks, or as many as are left."""
        for block in range(self._next, min(self._next + blocks, self._span.end)):
            inputs = self.hidden.detach().requires_grad_(self._graph)
            with torch.set_grad_enabled(self._graph):
                outputs = loaded.forward(inputs.unsqueeze(0), self._batch, Span(block, block + 1))[0]
            if self._graph:
                self._stages.append(_Stage(block, inputs, outputs))
            self.hidden = outputs.detach()
            self._next = block + 1

    def backward(self, blocks: int, until: int, sums: dict[str, torch.Tensor], *, inputs: bool) -> bool:
        """Back through the next ``blocks`` blocks; return whether ``until`` was the last of them.

        Gradients of the adapter's weights are added to ``sums``, unless it is empty. Without ``inputs`` those
        of the inputs of ``until`` are left out.
        """
        for _ in range(blocks):
            stage = self._stages.pop()
            names = self._adapter.names_in(stage.block) if sums and self._adapter is not None else []
            onward = [stage.inputs] if inputs or stage.block > until else []
            leaves = [*onward, *(self._weights[name] for name in names)]
            if leaves:
                found = torch.autograd.grad(
                    stage.outputs, leaves, self.gradient, allow_unused=True, materialize_grads=True
                )
                if onward:
                    self.gradient = found[0]
                for name, gradient in zip(names, found[len(onward) :], strict=True):
                    sums[name] += gradient
            if stage.block == until:
                self._stages.clear()
                return True
        return False


class SavedBytes:
    """Counts the memory of what graphs save for the backward pass, each tensor once and no weights."""

    def __init__(self, loaded: LoadedBlocks, span: Span) -> None:
        self.total = 0
        self._seen = {
            tensor.untyped_storage().data_ptr() for block in span for tensor in _tensors(loaded.block(block))
        }

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Within it, what is saved counts."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, _same)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        self.add(tensor)
        return tensor.detach()  # a node that held on to its own output would never be freed


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tensors(block: nn.Module) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]
