"""The records of the forward and backward protocols: batches through a span, and gradients back through it.

Both are one channel for each pass. The client sends the opening record, then its rows in pieces; the server
asks for what it lacks, and sends its own rows in pieces. Rows are the tokens of all sequences one after the
other, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from swarmcore.errors import SwarmError
from swarmcore.wire.framing import wire_tag
from swarmcore.wire.tensors import FLOATS, Tensor

PART_BYTES = 2**17
PART_TENSORS = 32
"""About how much of an adapter goes into one `AdapterPart`; not much, so that on a slow link the next one
comes in time."""

FORWARD = "/swarmcore/forward/1"
BACKWARD = "/swarmcore/backward/1"
FORWARD_OF_PADDING = "/swarmcore/forward/2"
BACKWARD_OF_PADDING = "/swarmcore/backward/2"
"""The same, for batches with ``padding``, which servers of the first version would take for tokens."""


@attrs.frozen
class AdapterName:
    """Which small weights a pass or a session uses besides the frozen ones: low-rank updates, key prefixes.

    Either one that the server was started with, under its ``name``, or the client's own, whose ``version`` is
    32 hex digits that change with every change of its weights. A server keeps the latter for the peer that
    sent it, as long as there is room, and asks for it when it does not have it.
    """

    name: str = ""
    version: str = ""


@wire_tag("OpenForward")
@attrs.frozen
class OpenForward:
    """Client to server, first message: run a batch through blocks ``start`` to ``end``."""

    fingerprint: str
    start: int
    end: int
    lengths: tuple[int, ...]
    """Tokens of each sequence; their sum is the number of rows."""
    codec: str = "raw"
    """How the outputs are to be encoded."""
    deadline: float = 120.0
    """Seconds, from its receipt, in which the result is of use to the client."""
    adapter: AdapterName | None = None
    keep: str = ""
    """32 hex digits under which the server may keep activations for an `OpenBackward`; empty for none."""
    reproducible: bool = False
    """Compute in an order that depends on the batch alone, so that a repetition gives the same bits."""
    padding: bool = False
    """The rows attend to nothing, not even to themselves, as padding before a sequence does."""
    progress: bool = False
    """Send `PassProgress` while it is computed; ``deadline`` then counts from the last of them."""


@wire_tag("OpenBackward")
@attrs.frozen
class OpenBackward:
    """Client to server, first message: gradients of a batch's inputs from gradients of its outputs."""

    fingerprint: str
    start: int
    end: int
    lengths: tuple[int, ...]
    codec: str = "raw"
    deadline: float = 120.0
    adapter: AdapterName | None = None
    kept: str = ""
    """`OpenForward.keep` of the forward pass that this follows; the server asks for the inputs when it no
    longer has that pass's activations, and always where this is empty."""
    inputs: bool = True
    """Whether the gradient of the inputs is wanted."""
    weights: bool = False
    """Whether the gradients of the adapter's weights are wanted."""
    reproducible: bool = False
    padding: bool = False
    progress: bool = False


@wire_tag("Rows")
@attrs.frozen
class Rows:
    """Some rows, as tensor ``hidden``, ``[rows, hidden size]``: inputs, outputs, or gradients of either.

    The pieces of one kind come in order.
    """

    kind: str
    """``"inputs"``, ``"outputs"`` or ``"gradients"``: of the outputs to the server, of the inputs from it."""
    first: int
    """Index of the first of them."""


@wire_tag("InputsWanted")
@attrs.frozen
class InputsWanted:
    """Server to client: the backward pass needs the inputs of its forward pass again."""


@wire_tag("AdapterWanted")
@attrs.frozen
class AdapterWanted:
    """Server to client: send the adapter's weights for these blocks."""

    blocks: tuple[int, ...]


@wire_tag("AdapterPart")
@attrs.frozen
class AdapterPart:
    """Weights of an adapter, or their gradients.

    Tensors are named ``"<block>.<module>.lora_A"`` ``[rank, in]`` and ``"<block>.<module>.lora_B"``
    ``[out, rank]``, with the module as it is called inside of its block (``self_attn.q_proj``), and
    ``"<block>.prefix"`` ``[2, tokens, key heads, head size]``: keys, then values, of positions that every
    sequence has before its first token.
    """

    scaling: float = 1.0
    """What the products of the low-rank updates are multiplied by."""
    last: bool = False
    """Whether the blocks asked for are complete with this part."""


@wire_tag("PassProgress")
@attrs.frozen
class PassProgress:
    """Server to client: it gets on, with this pass or with those before it."""

    work: int
    """Grows with all that the server gets done."""


@wire_tag("ForwardDone")
@attrs.frozen
class ForwardDone:
    """Server to client: all outputs have been sent."""

    kept: bool = False
    """Whether activations are kept, for now."""
    seconds: float = 0.0
    """Time at work on it, without waiting."""
    receiving: float = 0.0
    """Seconds from the opening until the last of the client's rows had come."""


@wire_tag("BackwardDone")
@attrs.frozen
class BackwardDone:
    """Server to client: all gradients have been sent."""

    seconds: float = 0.0
    receiving: float = 0.0


class RowsIntake:
    """Puts the pieces of one kind of rows together. Memory grows with what has come, not with what will."""

    def __init__(self, kind: str, rows: int, width: int, refusal: type[SwarmError]) -> None:
        """``rows`` of ``width`` values are to come; ``refusal`` is raised for any others."""
        self.kind = kind
        self._rows, self._width = rows, width
        self._refusal = refusal
        self._received = 0
        self._dtype = ""
        self._values = bytearray()

    @property
    def complete(self) -> bool:
        return self._received == self._rows

    def check(self, record: Rows, hidden: Tensor) -> None:
        """Raise the refusal unless these rows, still encoded, come next, in the form that is expected."""
        if record.kind != self.kind:
            raise self._refusal(f"rows of the {record.kind[:32]!r} came where {self.kind} were expected")
        if record.first != self._received:
            raise self._refusal(
                f"rows of the {self.kind} from {record.first} on came where those from {self._received} on "
                f"were expected"
            )
        rows = hidden.shape[0] if len(hidden.shape) == 2 else 0
        if rows < 1 or hidden.shape[1] != self._width or self._received + rows > self._rows:
            raise self._refusal(
                f"rows of the {self.kind} have shape {list(hidden.shape)}; expected {self._width} values in "
                f"each of 1 to {self._rows - self._received} rows"
            )
        if hidden.dtype not in FLOATS or (self._dtype and hidden.dtype != self._dtype):
            expected = self._dtype or ", ".join(FLOATS)
            raise self._refusal(f"rows of the {self.kind} are {hidden.dtype!r}; expected {expected}")

    def add(self, hidden: Tensor) -> None:
        """Take in rows that were checked and decoded."""
        self._dtype = hidden.dtype
        self._values += hidden.data
        self._received += hidden.shape[0]

    def whole(self) -> Tensor:
        """All rows, raw; once it is complete."""
        return Tensor("hidden", self._dtype, (self._rows, self._width), memoryview(self._values))


def adapter_parts(tensors: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], bool]]:
    """The tensors of one `AdapterPart` after the other, and whether it is the last; one at least."""
    first = 0
    while True:
        end, size = first, 0
        while end < len(tensors) and end - first < PART_TENSORS and size < PART_BYTES:
            size += tensors[end].data.nbytes
            end += 1
        yield tensors[first:end], end == len(tensors)
        if end == len(tensors):
            return
        first = end
