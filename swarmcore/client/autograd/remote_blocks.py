"""Remote blocks as a module of PyTorch: hidden states in, hidden states out, and gradients back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.bridge import Bridge
from swarmcore.client.autograd.micro_batches import BatchRunner, ForwardContext, InputGradients
from swarmcore.client.autograd.packing import PackedRows, snapshot
from swarmcore.client.autograd.rpc import MicroBatch
from swarmcore.errors import InputError, SpanError
from swarmcore.executor.torch.device import DTYPE_NAMES
from swarmcore.executor.torch.wire_tensors import to_torch
from swarmcore.types import ModelInfo, Span

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter


class RemoteBlocks(nn.Module):
    """Consecutive blocks of a model that servers run, for use among other modules.

    ``model.blocks`` is all of them; ``model.blocks[3:7]`` some. Their weights are frozen and not here: the
    parameters of this module are those of its adapter, if it has one. Call it from any thread, inside a
    running event loop or not; where you can await, `forward_async` does the same without blocking.
    """

    def __init__(
        self, bridge: Bridge, model: ModelInfo, span: Span, adapter: BlockAdapter | str | None = None
    ) -> None:
        super().__init__()
        self.model_info, self.span = model, span
        self.adapter = adapter
        self._bridge = bridge

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """One block, or blocks in a row. Raise `SpanError` for a step, for none, and for blocks not here."""
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
        else:
            start, step = index + len(self) if index < 0 else index, 1
            end = start + 1
        if step != 1 or not 0 <= start < end <= len(self):
            raise SpanError(f"blocks[{index}] of {len(self)} blocks; expected one, or a range without holes")
        span = Span(self.span.start + start, self.span.start + end)
        return RemoteBlocks(self._bridge, self.model_info, span, self.adapter)

    def adapted(self, adapter: BlockAdapter | str) -> RemoteBlocks:
        """The same blocks with an adapter: one of the client's own, or the name of one that servers have."""
        return RemoteBlocks(self._bridge, self.model_info, self.span, adapter)

    def extra_repr(self) -> str:
        return f"{self.model_info.name}, blocks {self.span}"

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        adapter: BlockAdapter | str | None = None,
        padding: bool = False,
    ) -> torch.Tensor:
        """Hidden states ``[batch, tokens, hidden size]`` after the last of the blocks, same shape and dtype.

        Sequences begin at position 0. ``attention_mask``, ``[batch, tokens]``, is 0 for padding, at the
        left or the right of a sequence; no time is spent on it, and zeros come out there. With ``padding``,
        what is before a sequence comes out as it does of the plain model with PyTorch's attention, where it
        attends to nothing: the first token is predicted from it. ``adapter`` takes the place of the module's
        own. Gradients flow to ``hidden`` and to the adapter's weights, once.

        Raise `InputError` for shapes, masks and dtypes that do not work, `MissingBlocksError` when nobody
        takes batches through some of the blocks, `InvalidBatchError` for values that are not finite,
        `ServerMemoryError` when every server ran out of memory.
        """
        call = self._call(hidden, attention_mask, adapter)
        before = None if attention_mask is None or not padding else attention_mask.cumsum(1) == 0
        if before is None or not before.any():
            return call.joined(self._bridge.run(call.forward))
        rows, places = _distinct(hidden[before.to(hidden.device)])
        beside = self._call(rows[:, None], None, adapter, padding=True)

        async def both(runner: BatchRunner) -> tuple[list[ForwardContext], list[ForwardContext]]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(each.forward(runner)) for each in (call, beside)]
            return tasks[0].result(), tasks[1].result()

        try:
            contexts, contexts_beside = self._bridge.run(both)
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from None
        outputs, found = call.joined(contexts), beside.joined(contexts_beside)[:, 0][places]
        return outputs.masked_scatter(before.to(hidden.device)[..., None], found)

    async def forward_async(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        adapter: BlockAdapter | str | None = None,
    ) -> torch.Tensor:
        """As `forward`, without blocking. The backward pass is autograd's, which blocks its thread:
        ``await asyncio.to_thread(loss.backward)`` leaves the event loop free.
        """
        call = self._call(hidden, attention_mask, adapter)
        return call.joined(await self._bridge.run_async(call.forward))

    def _call(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        adapter: BlockAdapter | str | None,
        *,
        padding: bool = False,
    ) -> _BlocksCall:
        if hidden.dim() != 3 or hidden.shape[-1] != self.model_info.hidden_size or not hidden.numel():
            raise InputError(
                f"hidden states of shape {list(hidden.shape)}; expected [batch, tokens, "
                f"{self.model_info.hidden_size}], not empty"
            )
        if hidden.dtype not in DTYPE_NAMES:
            raise InputError(f"hidden states are {hidden.dtype}; expected {', '.join(DTYPE_NAMES.values())}")
        chosen = self.adapter if adapter is None else adapter
        weights = {} if chosen is None or isinstance(chosen, str) else chosen.named_weights(self.span)
        rows = PackedRows((hidden.shape[0], hidden.shape[1]), attention_mask)
        used = snapshot(chosen, self.span)
        return _BlocksCall(self._bridge, self.span, hidden, rows, used, weights, padding=padding)


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[rows, size]`` that differ, and for each row which of them it is; gradients keep them apart."""
    if rows.requires_grad and torch.is_grad_enabled():
        return rows, torch.arange(len(rows), device=rows.device)
    distinct, places = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, places


class _BlocksCall:
    """One call of the blocks: its rows, and what autograd needs to go back."""

    def __init__(
        self,
        bridge: Bridge,
        span: Span,
        hidden: torch.Tensor,
        rows: PackedRows,
        adapter: AdapterWeights | None,
        weights: dict[str, torch.Tensor],
        *,
        padding: bool = False,
    ) -> None:
        self._padding = padding
        self._bridge, self._span, self._rows, self._adapter = bridge, span, rows, adapter
        self._hidden, self._weights = hidden, weights
        self._groups = rows.groups(bridge.options.micro_batch_tokens)
        self._contexts: list[ForwardContext] = []
        self._inputs = rows.pack(hidden, self._groups)
        wanted = hidden.requires_grad or any(weight.requires_grad for weight in weights.values())
        self._differentiable = wanted and torch.is_grad_enabled()

    async def forward(self, runner: BatchRunner) -> list[ForwardContext]:
        options = runner.options
        batches = [
            MicroBatch(group, self._adapter, options.reproducible, options.timeout, self._padding)
            for group in self._groups
        ]
        work = list(zip(batches, self._inputs, strict=True))
        return await runner.forward(self._span, work, needs_backward=self._differentiable)

    def joined(self, contexts: list[ForwardContext]) -> torch.Tensor:
        """The result, part of autograd's graph."""
        outputs = self._rows.unpack([context.outputs for context in contexts], self._hidden)
        if not self._differentiable:
            return outputs
        self._contexts = contexts
        apply: Any = _RemoteFunction.apply  # torch has no types for it
        result: torch.Tensor = apply(self, outputs, self._hidden, *self._weights.values())
        # The graph holds on to this, and must not be held by it.
        del self._hidden, self._inputs
        return result

    def backward(
        self, gradient: torch.Tensor, inputs: bool, weights: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of the inputs and of the adapter's weights, where they are asked for."""
        if self._padding and not gradient.any():  # nothing was predicted from it
            nothing = [torch.zeros_like(weight) if weights else None for weight in self._weights.values()]
            return (torch.zeros_like(gradient) if inputs else None), nothing
        packed = self._rows.pack(gradient, self._groups)

        async def work(runner: BatchRunner) -> list[InputGradients]:
            return await runner.backward(self._contexts, packed, inputs=inputs, weights=weights)

        back = self._bridge.run(work)
        hidden = None
        if inputs:
            hidden = self._rows.unpack([each.gradients for each in back if each.gradients], gradient)
        return hidden, self._sums(back) if weights else [None] * len(self._weights)

    def _sums(self, back: list[InputGradients]) -> list[torch.Tensor | None]:
        """The weights' gradients, added up in the order of the micro-batches."""
        sums = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        for each in back:
            for tensor in each.weights:
                into = sums[tensor.name]
                into += to_torch(tensor).to(into.device, into.dtype)
        return list(sums.values())


class _RemoteFunction(torch.autograd.Function):
    """Makes what came back from servers part of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: _BlocksCall, outputs: torch.Tensor, hidden: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.call = call
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        _, _, inputs, *weights = ctx.needs_input_grad
        hidden, found = ctx.call.backward(gradient, inputs, any(weights))
        return None, None, hidden, *found
