"""Forward and backward passes with torch: microbatches of whole sequences, a block or a few at a time."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from swarmcore.errors import InternalError, InvalidBatchError
from swarmcore.executor.base import BackwardPass, ForwardPass, TrainingBatch, TrainingPass
from swarmcore.executor.torch.adapters import TorchAdapter
from swarmcore.executor.torch.device import memory_errors, wait_for
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.microbatch import Microbatch, SavedBytes
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

REPRODUCIBLE_TOKENS = 128
"""Sequences of a reproducible batch go together up to this many tokens, whatever a unit may have."""


Unit = Callable[[LoadedBlocks], bool]
"""Computes a unit on the blocks; returns whether it was the last."""


@attrs.frozen
class ComputeThread:
    """The executor's compute thread, as far as passes need it: units run there, one at a time."""

    run: Callable[[Unit, Span, TorchAdapter | None], Awaitable[bool]]
    """Calls the unit with the blocks that are loaded now, ready for the adapter.

    Raises `SpanError` when those of the span are not loaded any more.
    """
    later: Callable[[Callable[[], None]], None]
    """Calls something after what runs now."""
    device: torch.device
    dtype: torch.dtype


class _TorchPass(TrainingPass):
    """What both directions have in common: cutting into microbatches, timing, ending."""

    def __init__(self, thread: ComputeThread, batch: TrainingBatch, adapter: TorchAdapter | None) -> None:
        """``adapter`` is that of ``batch``; the caller has checked that both fit the blocks."""
        self._thread, self._batch, self._adapter = thread, batch, adapter
        self._inputs: torch.Tensor | None = None
        self._current: Microbatch | None = None
        self._sequence = self._row = 0  # of the next microbatch
        self._done = self._closed = False

    async def advance(self, max_tokens: int) -> bool:
        """As `TrainingPass.advance`; of a reproducible batch a unit has `REPRODUCIBLE_TOKENS` at most."""
        if self._closed or self._done:
            raise InternalError("the pass is over")
        clock = asyncio.get_running_loop().time

        def unit(loaded: LoadedBlocks) -> bool:
            began = clock()
            try:
                with memory_errors("a pass"), self._kernels():
                    self._done = self._unit(loaded, max_tokens)
                    wait_for(self._thread.device)  # or steps would queue behind what is timed as nothing
            except BaseException:
                self._free()
                raise
            finally:
                self.seconds += clock() - began
            return self._done

        try:
            return await self._thread.run(unit, self._batch.span, self._adapter)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As `TrainingPass.close`; what a unit that was given up works on is freed when it is through."""
        if not self._closed:
            self._closed = True
            self._thread.later(self._free)

    @abstractmethod
    def _unit(self, loaded: LoadedBlocks, max_tokens: int) -> bool:
        """Compute a unit; return whether it was the last."""

    def _free(self) -> None:
        self._inputs = self._current = None

    def _kernels(self) -> AbstractContextManager[object]:
        """Those of attention on GPUs that are fused add up in another order every time."""
        if self._batch.reproducible and self._thread.device.type == "cuda":
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    @property
    def _exhausted(self) -> bool:
        """Whether every sequence is in a microbatch or past it."""
        return self._sequence == len(self._batch.lengths)

    def _next_microbatch(self, max_tokens: int, *, graph: bool) -> Microbatch:
        lengths = self._batch.lengths
        if self._batch.reproducible:
            max_tokens = REPRODUCIBLE_TOKENS
        last = self._sequence + 1
        tokens = lengths[self._sequence]
        while last < len(lengths) and tokens + lengths[last] <= max_tokens:
            tokens += lengths[last]
            last += 1
        if self._inputs is None:
            self._inputs = to_torch(self._batch.hidden)
        rows = self._inputs[self._row : self._row + tokens].to(self._thread.device, self._thread.dtype)
        check_finite(rows, "inputs")
        microbatch = Microbatch(
            self._row,
            lengths[self._sequence : last],
            rows,
            self._batch.span,
            self._adapter,
            graph=graph,
            padding=self._batch.padding,
        )
        self._sequence, self._row = last, self._row + tokens
        return microbatch


class TorchForward(_TorchPass, ForwardPass):
    """A forward pass that keeps its microbatches' graphs, or nothing."""

    def __init__(
        self, thread: ComputeThread, batch: TrainingBatch, adapter: TorchAdapter | None, *, keep: bool
    ) -> None:
        super().__init__(thread, batch, adapter)
        self._keep = keep
        self._kept: list[Microbatch] = []
        self._saved: SavedBytes | None = None
        self._outputs: torch.Tensor | None = None

    def _unit(self, loaded: LoadedBlocks, max_tokens: int) -> bool:
        if self._current is None:
            self._current = self._next_microbatch(max_tokens, graph=self._keep)
        current, blocks = self._current, max(1, max_tokens // self._current.tokens)
        if self._keep:
            if self._saved is None:
                self._saved = SavedBytes(loaded, self._batch.span)
            with self._saved.counting():
                current.forward(loaded, blocks)
            self.kept_bytes = self._saved.total
        else:
            current.forward(loaded, blocks)
        if not current.through:
            return False
        if self._outputs is None:
            self._outputs = torch.empty(self._batch.tokens, current.hidden.shape[1], dtype=self._thread.dtype)
        check_finite(current.hidden, "outputs")
        self._outputs[current.rows] = current.hidden.cpu()
        if self._saved is not None:
            self._saved.add(current.hidden)
            self.kept_bytes = self._saved.total
            self.token_bytes = self._saved.total / (self._row * len(self._batch.span))
            self._kept.append(current)
        self._current = None
        if self._exhausted:
            self.outputs = to_wire("hidden", self._outputs)
            self._inputs = None
        return self._exhausted

    def forget(self) -> None:
        """As `ForwardPass.forget`; the microbatch that is being computed is not cut off."""
        self._keep, self._saved, self.kept_bytes = False, None, 0
        self._thread.later(self._kept.clear)

    def take(self) -> list[Microbatch]:
        """The microbatches that were kept, in order; the pass is closed."""
        if not (self._keep and self._done) or self._closed:
            raise InternalError("the forward pass has kept nothing for a backward pass")
        kept, self._kept = self._kept, []
        self.close()
        return kept

    def _free(self) -> None:
        super()._free()
        self._kept, self._outputs = [], None


class TorchBackward(_TorchPass, BackwardPass):
    """A backward pass, from a forward pass's microbatches or from ones computed anew, one after the other."""

    def __init__(
        self,
        thread: ComputeThread,
        batch: TrainingBatch,
        adapter: TorchAdapter | None,
        gradients: Tensor,
        kept: TorchForward | None,
        *,
        inputs: bool,
        weights: bool,
    ) -> None:
        super().__init__(thread, batch, adapter)
        self._encoded = gradients
        self._given: torch.Tensor | None = None
        self._kept = None if kept is None else kept.take()
        self._want_inputs = inputs
        self._until = batch.span.start
        """The last block of the backward pass: below the adapter's first there may be nothing to compute."""
        self._weights: dict[str, torch.Tensor] = {}
        if adapter is not None:
            self._weights = adapter.weights_in(batch.span) if weights else {}
            if not inputs:
                first = max(self._until, adapter.span.start)
                self._until = min(first, batch.span.end - 1)
        self._found: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._saved: SavedBytes | None = None

    def _unit(self, loaded: LoadedBlocks, max_tokens: int) -> bool:
        if self._given is None:
            self._begin()
        if self._current is None:
            self._current = self._next(max_tokens)
        current, blocks = self._current, max(1, max_tokens // self._current.tokens)
        if not current.through:
            self._compute_again(current, loaded, blocks)
            return False
        if not current.backward(blocks, self._until, self._sums, inputs=self._want_inputs):
            return False
        if self._want_inputs:
            check_finite(current.gradient, "gradients of the inputs")
            assert self._found is not None
            self._found[current.rows] = current.gradient.cpu()
        self._current = None
        if self._kept or (self._kept is None and not self._exhausted):
            return False
        self._finish()
        return True

    def _compute_again(self, current: Microbatch, loaded: LoadedBlocks, blocks: int) -> None:
        if self.token_bytes:
            current.forward(loaded, blocks)
            return
        if self._saved is None:
            self._saved = SavedBytes(loaded, self._batch.span)
        with self._saved.counting():
            current.forward(loaded, blocks)
        if current.through:
            self.token_bytes = self._saved.total / (current.tokens * len(self._batch.span))

    def _begin(self) -> None:
        self._given = to_torch(self._encoded)
        if self._want_inputs:
            self._found = torch.empty(self._given.shape, dtype=self._thread.dtype)
        self._sums = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self._weights.items()
        }

    def _next(self, max_tokens: int) -> Microbatch:
        """The next microbatch, with its gradient, which is looked at before anything is computed."""
        current = self._kept.pop(0) if self._kept else self._next_microbatch(max_tokens, graph=True)
        assert self._given is not None
        current.gradient = self._given[current.rows].to(self._thread.device, self._thread.dtype)
        check_finite(current.gradient, "gradients of the outputs")
        return current

    def _finish(self) -> None:
        if self._found is not None:
            self.gradients = to_wire("hidden", self._found)
        for name, total in self._sums.items():
            check_finite(total, f"gradients of {name}")
        self.weights = tuple(
            to_wire(name, total.to(self._weights[name].dtype)) for name, total in self._sums.items()
        )
        self._free()

    def _free(self) -> None:
        super()._free()
        self._kept = None if self._kept is None else []
        self._given = self._found = None
        self._sums = {}


def check_rows(tensor: Tensor, what: str, tokens: int, width: int) -> None:
    """Raise `InvalidBatchError` unless ``tensor`` is ``[tokens, width]`` of floats."""
    if tensor.shape != (tokens, width):
        raise InvalidBatchError(
            f"the {what} have shape {list(tensor.shape)}; the batch needs [{tokens}, {width}]"
        )
    if "float" not in tensor.dtype:
        raise InvalidBatchError(f"the {what} are of dtype {tensor.dtype}; expected floats")


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `InvalidBatchError` for values that are not finite."""
    if not torch.isfinite(values).all():
        raise InvalidBatchError(
            f"the batch was refused: its {what} have values that are not finite in {values.dtype}; "
            f"look for NaN, or for values too large for that dtype, in what was sent"
        )
