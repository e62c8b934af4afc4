"""Low-rank updates (LoRA) of projections: of one adapter for a whole batch, or of many for its rows."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn.functional import linear

from swarmcore.executor.torch.adapters import TorchAdapter, projection
from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import AdapterUpdates, TargetModule
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.types import Span

_SLICED_ROWS = 32
"""From this many rows for each adapter on, a product for each is faster than one for all."""

_KEPT_STACKS = 4
"""Sets of adapters whose weights are kept together."""


class Hooks:
    """The hooks on the modules of an executor's blocks, put there when an adapter first needs them."""

    def __init__(self) -> None:
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._ready: weakref.WeakKeyDictionary[TorchAdapter, weakref.ref[LoadedBlocks]] = (
            weakref.WeakKeyDictionary()
        )

    def install(self, adapter: TorchAdapter, loaded: LoadedBlocks) -> None:
        """Make the modules that ``adapter`` changes ask for it, as far as they are held."""
        ready = self._ready.get(adapter)
        if ready is not None and ready() is loaded:
            return
        for target in adapter.targets:
            if not loaded.holds(Span(target.block, target.block + 1)):
                continue
            module = projection(loaded, target)
            if module not in self._hooked:
                module.register_forward_hook(_Hook(target))
                self._hooked.add(module)
        self._ready[adapter] = weakref.ref(loaded)


class _Hook:
    def __init__(self, target: TargetModule) -> None:
        self._target = target

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
        updates = current_batch().updates
        return None if updates is None else updates.add(self._target, inputs[0], output)


class OneAdapter(AdapterUpdates):
    """The same adapter for all rows, differentiable with respect to its weights."""

    def __init__(self, weights: Mapping[str, torch.Tensor], scaling: float) -> None:
        self._weights, self._scaling = weights, scaling

    def add(self, target: TargetModule, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        a = self._weights.get(target.lora_a)
        if a is None:
            return output
        b = self._weights[target.lora_b].to(rows.dtype)
        low = linear(rows, a.to(rows.dtype)).flatten(0, -2)
        return torch.addmm(output.flatten(0, -2), low, b.t(), alpha=self._scaling).view_as(output)


@attrs.frozen(eq=False)
class _Stack:
    """The weights of several adapters for one projection."""

    a: torch.Tensor
    """``[ranks, in]``, those of one adapter after those of another."""
    b: torch.Tensor
    """``[ranks, out]``, times the scaling."""
    columns: Mapping[int, tuple[int, int]]
    """Which of the ranks are an adapter's: the first and how many, by its place among the adapters."""
    owners: torch.Tensor
    """``[ranks]``: the place of the adapter that each belongs to."""


class StackedAdapters:
    """The low-rank weights of several adapters together, on the device of the blocks.

    They are in float32 on CPUs, where products of a few rows have half the cost in it that they have in 16
    bits, and in the blocks' dtype elsewhere.
    """

    def __init__(self, adapters: Sequence[TorchAdapter], dtype: torch.dtype) -> None:
        self.places: weakref.WeakKeyDictionary[TorchAdapter, int] = weakref.WeakKeyDictionary()
        """Of each adapter, its place among them."""
        members: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for place, adapter in enumerate(adapters):
            self.places[adapter] = place
            for target in adapter.targets:
                a, b = adapter.weights[target.lora_a], adapter.weights[target.lora_b] * adapter.scaling
                stacked = torch.float32 if a.device.type == "cpu" else dtype
                a, b = a.to(stacked), b.to(stacked)
                members.setdefault(target.lora_a, []).append((place, a, b.t()))
        self.stacks = {name: _stack(each) for name, each in members.items()}
        """By the name of the first of a target's weights."""
        self.count = len(adapters)


class StackCache:
    """Stacks of the sets of adapters that were used last; one is dropped once an adapter of it is gone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[StackedAdapters] = []

    def get(self, adapters: set[TorchAdapter]) -> StackedAdapters:
        """A stack of these adapters, and perhaps as many others."""
        self._kept = [stacked for stacked in self._kept if len(stacked.places) == stacked.count]
        for index, stacked in enumerate(self._kept):
            if stacked.count <= 2 * len(adapters) and adapters <= set(stacked.places):
                self._kept.append(self._kept.pop(index))
                return stacked
        stacked = StackedAdapters(list(adapters), self._dtype)
        self._kept = [*self._kept[1 - _KEPT_STACKS :], stacked]
        return stacked


class RowAdapters(AdapterUpdates):
    """Every row of a ragged batch with its own adapter, or with none. For inference: it changes outputs."""

    def __init__(self, rows: Sequence[tuple[TorchAdapter | None, int]], stacked: StackedAdapters) -> None:
        """``rows`` are adapters with how many rows each has, in order."""
        self._stacks = stacked.stacks
        self._runs: list[tuple[int, int, int]] = []  # an adapter's place, its first row, how many
        places, first = [], 0
        for adapter, count in rows:
            place = -1 if adapter is None else stacked.places[adapter]
            places += [place] * count
            if self._runs and self._runs[-1][0] == place:
                self._runs[-1] = (place, self._runs[-1][1], self._runs[-1][2] + count)
            else:
                self._runs.append((place, first, count))
            first += count
        self._runs = [run for run in self._runs if run[0] >= 0]
        self._sliced = sum(run[2] for run in self._runs) >= _SLICED_ROWS * len(self._runs)
        self._owners = torch.tensor(places).unsqueeze(1)
        self._others: dict[tuple[int, ...], torch.Tensor] = {}

    def add(self, target: TargetModule, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        stack = self._stacks.get(target.lora_a)
        if stack is None:
            return output
        inputs, outputs = rows.flatten(0, -2), output.view(-1, output.shape[-1])
        if not self._sliced:
            # One product for all ranks, of which each row keeps its own adapter's.
            low = linear(inputs.to(stack.a.dtype), stack.a).masked_fill_(self._not_its_own(stack), 0)
            if stack.b.dtype == outputs.dtype:
                outputs.addmm_(low, stack.b)
            else:
                outputs.add_(low @ stack.b)
            return output
        for place, first, count in self._runs:
            if place in stack.columns:
                at, rank = stack.columns[place]
                a, b = (part.narrow(0, at, rank).to(inputs.dtype) for part in (stack.a, stack.b))
                outputs.narrow(0, first, count).addmm_(linear(inputs.narrow(0, first, count), a), b)
        return output

    def _not_its_own(self, stack: _Stack) -> torch.Tensor:
        """Where a rank is not of the adapter of a row, ``[rows, ranks]``."""
        key = tuple(value for columns in stack.columns.items() for value in (columns[0], columns[1][1]))
        if key not in self._others:
            self._others[key] = self._owners.to(stack.owners.device) != stack.owners
        return self._others[key]


def _stack(members: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> _Stack:
    columns, owners, at = {}, [], 0
    for place, a, _ in members:
        rank = a.shape[0]
        columns[place] = at, rank
        owners += [place] * rank
        at += rank
    a = torch.cat([a for _, a, _ in members])
    return _Stack(a, torch.cat([b for _, _, b in members]), columns, torch.tensor(owners, device=a.device))
