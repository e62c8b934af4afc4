"""A model that is only arithmetic: cheap, and a token that is wrong, stale, doubled or missing shows.

A row of hidden states is a pair of 64-bit numbers. The first names the token and passes through every block
unchanged. To the second every block adds a number of its own times a hash of all tokens of the sequence so
far, as *its own server's* attention cache has them. What comes out of the last block is right only if each
block ran once and every cache on the way held exactly the tokens of the sequence, in order. Blocks next to
each other take one addition together, so that a server of eighty costs no more than a server of one.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

import attrs

from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

MASK = 2**64 - 1
ROW_BYTES = 16
HIDDEN_SIZE = 4
"""Of 4-byte values: what a row takes in a message."""

VOCABULARY = 50_000

_NUMBERS = struct.Struct("<QQ")


def _mix(value: int) -> int:
    """The splitmix64 finaliser: neighbours come out unrelated."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def next_state(state: int, token: int) -> int:
    """The hash of a sequence that was ``state``, with one more token; 0 is the empty sequence."""
    return (state * 6364136223846793005 + token + 1442695040888963407) & MASK


@attrs.define(eq=False)
class SimModel:
    """What blocks and client of a simulated model compute."""

    name: str
    blocks: int
    row_bytes: int = ROW_BYTES
    """Of a row of hidden states: those of passes may be longer, with zeros at their end."""
    dtype: str = "float32"
    info: ModelInfo = attrs.field(init=False)
    _sums: list[int] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        width = self.row_bytes // ITEM_BYTES[self.dtype]
        self.info = ModelInfo(self.name, f"simulated-{self.name}", self.blocks, width)
        self._sums = [0]
        for block in range(self.blocks):
            self._sums.append((self._sums[-1] + _mix(block)) & MASK)

    def weight(self, span: Span) -> int:
        """What the blocks of ``span`` multiply the hash of the sequence with, together."""
        return self._sums[span.end] - self._sums[span.start]

    def embed(self, tokens: Iterable[int]) -> Tensor:
        """The rows that go into the first block."""
        return pack_rows([number for token in tokens for number in (_mix(token), 0)])

    def start(self, seed: int) -> int:
        """The first token of a sequence that is told from others by ``seed``."""
        return _mix(seed) % VOCABULARY

    def choose(self, output: int) -> int:
        """The next token, given the second number of a row out of the last block."""
        return _mix(output) % VOCABULARY

    def expected(self, state: int) -> int:
        """The second number that is right after a sequence whose hash is ``state``."""
        return (self._sums[-1] * state) & MASK

    # --- batches of passes: the first row says which it is, and what became of it ------------------------

    def batch(self, name: int, rows: int) -> Tensor:
        """A batch called ``name`` on its way into the first block, or its gradient into the last."""
        return self._named(name, 0, rows)

    def forward(self, hidden: Tensor, span: Span) -> Tensor:
        """What comes out of ``span``, however it is cut."""
        name, number = batch_numbers(hidden)
        return self._named(name, number + self.weight(span) * _mix(name), hidden.shape[0])

    def backward(self, gradients: Tensor, hidden: Tensor, span: Span) -> Tensor:
        """The gradients of ``hidden``, the inputs of ``span``; they come out wrong if those are."""
        name, number = batch_numbers(gradients)
        off = batch_numbers(hidden)[1] - self._sums[span.start] * _mix(name)
        return self._named(name, number + self.weight(span) * (_mix(name + 1) + off), hidden.shape[0])

    def gradient(self, name: int) -> tuple[int, int]:
        """The numbers that the gradients of a batch's inputs have in the end, when all is right."""
        return name, (self._sums[-1] * _mix(name + 1)) & MASK

    def _named(self, name: int, number: int, rows: int) -> Tensor:
        data = bytearray(rows * self.row_bytes)
        _NUMBERS.pack_into(data, 0, name & MASK, number & MASK)
        return Tensor("hidden", self.dtype, (rows, self.info.hidden_size), memoryview(data))

    def follow(self, state: int, token: int) -> int:
        """`next_state`, for a token as the client knows it."""
        return next_state(state, _mix(token))


def batch_numbers(rows: Tensor) -> tuple[int, int]:
    """The name of a batch, and what became of it so far."""
    name, number = _NUMBERS.unpack_from(rows.data)
    return name, number


def pack_rows(numbers: Sequence[int]) -> Tensor:
    """A tensor ``"hidden"`` of rows, from two numbers for each."""
    data = array("Q", numbers)
    return Tensor("hidden", "float32", (len(numbers) // 2, HIDDEN_SIZE), memoryview(data).cast("B"))


def unpack_rows(tensor: Tensor) -> tuple[int, ...]:
    """The inverse of `pack_rows`."""
    data = tensor.decode().data
    return struct.unpack(f"<{data.nbytes // 8}Q", data)
