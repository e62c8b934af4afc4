"""Forward and backward passes without a model: arithmetic whose gradients are known, with plain floats.

Where a transformer block would attend, a block here adds a fading sum of the rows before, of the same
sequence; where it would mix the values of a row, it adds to each a part of its neighbour and a curve. What
it does differs from block to block and does not commute. So a row of another sequence, a block left out or
run twice, inputs of another batch or a gradient counted twice all show. Each block rounds to float32, and
the rows of a sequence depend on nothing else: the same sequence gives bitwise the same result, however
batches are cut into micro-batches, units, and spans.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from swarmcore.errors import AdapterError, InvalidBatchError, SwarmError
from swarmcore.executor.base import Adapter, TrainingBatch
from swarmcore.testing.fake_executor import FakeBackward, FakeExecutor, FakeForward, Unit
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values, tensor_of
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

FADE = 0.5
"""How much of the sum of the rows before is left a token later."""


def run_block(block: int, rows: Rows, adapter: CountingAdapter | None = None) -> Rows:
    """One sequence through one block."""
    width = len(rows[0])
    before = [0.0] * width
    outputs: Rows = []
    for x in rows:
        y = [
            x[j] * (1 + (block + j) / 64)
            + x[(j + 1) % width] / 32
            + before[j] / (8 + block)
            + math.sin(x[j] + block) / 16
            for j in range(width)
        ]
        if adapter is not None:
            y = [a + b for a, b in zip(y, adapter.change(block, x), strict=True)]
        outputs.append(list(array("f", y)))
        before = [FADE * a + b for a, b in zip(before, x, strict=True)]
    return outputs


def run_block_backward(
    block: int, rows: Rows, gradients: Rows, adapter: CountingAdapter | None = None
) -> Rows:
    """Gradients of the inputs ``rows`` of one sequence, from those of what `run_block` makes of them."""
    width = len(rows[0])
    after = [0.0] * width
    answer: Rows = []
    for x, g in zip(reversed(rows), reversed(gradients), strict=True):
        d = [
            g[j] * (1 + (block + j) / 64 + math.cos(x[j] + block) / 16) + g[(j - 1) % width] / 32 + after[j]
            for j in range(width)
        ]
        if adapter is not None:
            d = [a + b for a, b in zip(d, adapter.change_backward(block, g), strict=True)]
        answer.append(list(array("f", d)))
        after = [FADE * a + b / (8 + block) for a, b in zip(after, g, strict=True)]
    return answer[::-1]


class CountingAdapter(Adapter):
    """Adds to a block's output what its tensors say; the modules that they are named for make no difference.

    Low-rank updates ``lora_A``, ``lora_B`` add ``scaling * B @ (A @ x)``, with ``x`` the block's input row; a
    ``prefix`` adds a sixteenth of the sum of its keys and twice its values, over its tokens, to every row.
    """

    def __init__(self, tensors: Sequence[Tensor], scaling: float, width: int) -> None:
        self.tensors = tuple(tensors)
        self.nbytes = sum(tensor.decoded_nbytes for tensor in tensors)
        self.scaling = scaling
        self._low_rank: dict[int, list[tuple[str, Rows, Rows]]] = {}
        self._prefix: dict[int, list[float]] = {}
        self._read({tensor.name: tensor for tensor in tensors}, width)
        blocks = sorted({*self._low_rank, *self._prefix})
        self.span = Span(blocks[0], blocks[-1] + 1)

    def _read(self, named: dict[str, Tensor], width: int) -> None:
        lengths = set()
        for name, tensor in named.items():
            block, _, rest = name.partition(".")
            module, _, kind = rest.rpartition(".")
            if not block.isdecimal() or kind not in ("lora_A", "lora_B", "prefix") or not tensor.shape:
                raise AdapterError(f"tensor {name!r} is not of an adapter")
            if kind == "prefix":
                if len(tensor.shape) != 4 or tensor.shape[0] != 2 or math.prod(tensor.shape[2:]) != width:
                    raise AdapterError(
                        f"prefix {name!r} has shape {list(tensor.shape)}; expected [2, tokens, heads, size]"
                    )
                flat, tokens = read_values(tensor), tensor.shape[1]
                keys, values = flat[: tokens * width], flat[tokens * width :]
                self._prefix[int(block)] = [
                    (sum(keys[j::width]) + 2 * sum(values[j::width])) / 16 for j in range(width)
                ]
                lengths.add(tokens)
            elif kind == "lora_A":
                up = named.get(f"{block}.{module}.lora_B")
                if up is None or up.shape != (width, tensor.shape[0]) or tensor.shape[1:] != (width,):
                    raise AdapterError(f"tensor {name!r} does not fit its lora_B and rows of {width}")
                pair = (f"{block}.{module}", read_rows(tensor), read_rows(up))
                self._low_rank.setdefault(int(block), []).append(pair)
            elif f"{block}.{module}.lora_A" not in named:
                raise AdapterError(f"tensor {name!r} has no lora_A beside it")
        if len(lengths) > 1 or not named:
            raise AdapterError(f"prefixes of {sorted(lengths)} tokens in one adapter; expected one length")
        self.prefix_tokens = lengths.pop() if lengths else 0

    def change(self, block: int, x: Sequence[float]) -> list[float]:
        """What is added to the block's output for its input row ``x``."""
        y = list(self._prefix.get(block, [0.0] * len(x)))
        for _, down, up in self._low_rank.get(block, ()):
            y = [a + self.scaling * b for a, b in zip(y, _times(up, _times(down, x)), strict=True)]
        return y

    def change_backward(self, block: int, g: Sequence[float]) -> list[float]:
        """The part of the input's gradient that goes through `change`."""
        d = [0.0] * len(g)
        for _, down, up in self._low_rank.get(block, ()):
            back = _times(_transposed(down), _times(_transposed(up), g))
            d = [a + self.scaling * b for a, b in zip(d, back, strict=True)]
        return d

    def add_weights(self, sums: dict[str, list[float]], block: int, rows: Rows, gradients: Rows) -> None:
        """Add to ``sums``, by tensor name, the gradients that one sequence gives one block's tensors."""
        for x, g in zip(rows, gradients, strict=True):
            for name, down, up in self._low_rank.get(block, ()):
                inner, back = _times(down, x), _times(_transposed(up), g)
                _add(sums, f"{name}.lora_A", [self.scaling * b * value for b in back for value in x])
                _add(sums, f"{name}.lora_B", [self.scaling * value * a for value in g for a in inner])
            if block in self._prefix:
                keys = [value / 16 for value in g] * self.prefix_tokens
                _add(sums, f"{block}.prefix", keys + [2 * value for value in keys])


class CountingForward(FakeForward):
    """Keeps what went into each block."""

    def __init__(self, executor: FakeExecutor[Rows], batch: TrainingBatch, keep: bool) -> None:
        super().__init__(executor, batch, keep)
        self.inputs: dict[int, list[Rows]] = {}
        """The rows of each sequence that went into each block, if they are kept."""
        self._adapter = counting_adapter(batch.adapter)
        self._rows: list[Rows] = []

    def run(self, unit: Unit) -> None:
        self._rows = rows = self._rows or split(self.batch.hidden, self.batch.lengths, "inputs")
        width = self.batch.hidden.shape[1]
        if self.keep:
            self.token_bytes = 4.0 * width
        for i in range(unit.first, unit.end):
            if self.keep:
                self.inputs.setdefault(unit.block, []).append(rows[i])
                self.kept_bytes += 4 * width * len(rows[i])
            rows[i] = run_block(unit.block, rows[i], self._adapter)
        if unit.last:
            self.outputs = hidden_states([row for sequence in rows for row in sequence])

    def forget(self) -> None:
        super().forget()
        self.inputs = {}

    def close(self) -> None:
        super().close()
        self.inputs, self._rows = {}, []


class CountingBackward(FakeBackward):
    """Gradients of the inputs and of the adapter's weights, from what the forward pass kept."""

    def __init__(
        self,
        executor: FakeExecutor[Rows],
        batch: TrainingBatch,
        gradients: Tensor,
        forward: CountingForward,
        *,
        inputs: bool,
        weights: bool,
    ) -> None:
        super().__init__(executor, batch, forward)
        self._kept = forward
        self._adapter = counting_adapter(batch.adapter)
        self._given, self._inputs, self._weights = gradients, inputs, weights
        self._rows: list[Rows] = []
        self._sums: dict[str, list[float]] = {}

    async def _advance(self, max_tokens: int) -> None:
        self._rows = self._rows or split(self._given, self.batch.lengths, "gradients of the outputs")
        await super()._advance(max_tokens)

    def run(self, unit: Unit) -> None:
        rows, block, adapter = self._rows, unit.block, self._adapter
        for i in range(unit.first, unit.end):
            given = self._kept.inputs[block][i]
            if self._weights and adapter is not None:
                adapter.add_weights(self._sums, block, given, rows[i])
            rows[i] = run_block_backward(block, given, rows[i], adapter)
        if unit.last and self._inputs:
            self.gradients = hidden_states([row for sequence in rows for row in sequence])
        if unit.last and self._weights and adapter is not None:
            self.weights = tuple(
                tensor_of(tensor.name, self._sums[tensor.name], tensor.shape, tensor.dtype)
                for tensor in adapter.tensors
                if tensor.name in self._sums
            )


def counting_adapter(adapter: Adapter | None) -> CountingAdapter | None:
    """The adapter of a batch."""
    assert adapter is None or isinstance(adapter, CountingAdapter), "an adapter of another executor was given"
    return adapter


def split(hidden: Tensor, lengths: Sequence[int], what: str) -> list[Rows]:
    """The rows of each sequence. Raise `InvalidBatchError` for values that are not finite, or not decoded."""
    try:
        rows = read_rows(hidden)
    except SwarmError as exc:
        raise InvalidBatchError(f"the {what} do not decode: {exc.message}") from exc
    if not all(math.isfinite(value) for row in rows for value in row):
        raise InvalidBatchError(f"the {what} hold values that are not finite (NaN or infinity)")
    found, at = [], 0
    for length in lengths:
        found.append(rows[at : at + length])
        at += length
    return found


def _times(matrix: Sequence[Sequence[float]], x: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]


def _add(sums: dict[str, list[float]], name: str, values: list[float]) -> None:
    old = sums.get(name)
    sums[name] = values if old is None else [a + b for a, b in zip(old, values, strict=True)]


def _transposed(matrix: Rows) -> Rows:
    return [list(column) for column in zip(*matrix, strict=True)]
