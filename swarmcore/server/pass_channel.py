"""The channel of one forward or backward pass, from the server's side: rows in pieces, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from swarmcore.errors import DeadlineExceededError, InvalidBatchError, ProtocolError
from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.checks import check_codec
from swarmcore.rpc.channel import Channel
from swarmcore.server.adapters import Weights, WeightsIntake
from swarmcore.types import Span
from swarmcore.wire.framing import Message
from swarmcore.wire.passes import AdapterPart, AdapterWanted, InputsWanted, Rows, adapter_parts
from swarmcore.wire.tensors import FLOATS, ITEM_BYTES, Tensor

PIECE_BYTES = 2 * 2**20
"""Rows go out in pieces of at most about so many bytes, before they are encoded."""

PIECES = 4
"""Rows go out in so many pieces at least, unless they are small: how far apart these arrive tells the client
the rate of the link (`swarmcore.routing.link_codec`)."""

SMALL_PIECE_BYTES = 2**14

PIECE_TIMEOUT = 60.0
"""Seconds for the next piece to come: until then its pass takes room that others could have."""


class RowsIntake:
    """Puts the pieces of one kind of rows together. Memory grows with what has come, not with what will."""

    def __init__(self, kind: str, rows: int, width: int) -> None:
        self.kind = kind
        self._rows, self._width = rows, width
        self._received = 0
        self._dtype = ""
        self._values = bytearray()

    @property
    def complete(self) -> bool:
        return self._received == self._rows

    def check(self, record: Rows, hidden: Tensor) -> None:
        """Raise `InvalidBatchError` unless these rows come next, in the form that is expected."""
        if record.first != self._received:
            raise InvalidBatchError(
                f"rows of the {self.kind} from {record.first} on came where those from {self._received} on "
                f"were expected"
            )
        rows = hidden.shape[0] if len(hidden.shape) == 2 else 0
        if rows < 1 or hidden.shape[1] != self._width or self._received + rows > self._rows:
            raise InvalidBatchError(
                f"rows of the {self.kind} have shape {list(hidden.shape)}; expected {self._width} values in "
                f"each of 1 to {self._rows - self._received} rows"
            )
        if hidden.dtype not in FLOATS or (self._dtype and hidden.dtype != self._dtype):
            expected = self._dtype or ", ".join(FLOATS)
            raise InvalidBatchError(f"rows of the {self.kind} are {hidden.dtype!r}; expected {expected}")
        check_codec(hidden.codec)

    def add(self, hidden: Tensor) -> None:
        """Take in rows that were checked and decoded."""
        self._dtype = hidden.dtype
        self._values += hidden.data
        self._received += hidden.shape[0]

    def whole(self) -> Tensor:
        """All rows, raw."""
        return Tensor("hidden", self._dtype, (self._rows, self._width), memoryview(self._values))


class PassChannel:
    """Receives what one pass needs, in whichever order it comes, and sends what comes of it."""

    def __init__(self, channel: Channel, executor: BlockExecutor, rows: int) -> None:
        self._channel = channel
        self._executor = executor
        self._rows = rows
        self._intakes: dict[str, RowsIntake] = {}
        self._weights: WeightsIntake | None = None
        self._opened = asyncio.get_running_loop().time()
        self.receiving = 0.0
        """Seconds from the opening until the last rows that have come."""

    def expect(self, kind: str) -> None:
        """Rows of this kind are to come."""
        self._intakes[kind] = RowsIntake(kind, self._rows, self._executor.model.hidden_size)

    async def ask_inputs(self) -> None:
        """Have the client send the inputs."""
        self.expect("inputs")
        await self._channel.send(InputsWanted())

    async def weights(self, span: Span, max_bytes: int) -> Weights:
        """Have the client send its adapter's weights for ``span``, of ``max_bytes`` bytes at most.

        Rows that come before them are taken in.
        """
        self._weights = WeightsIntake(span, max_bytes)
        await self._channel.send(AdapterWanted(tuple(range(span.start, span.end))))
        while (whole := await self._next()) is None:
            pass
        self._weights = None
        return whole

    async def rows(self, kind: str) -> Tensor:
        """All rows of a kind that was expected, raw."""
        intake = self._intakes[kind]
        while not intake.complete:
            await self._next()
        return intake.whole()

    async def _next(self) -> Weights | None:
        try:
            async with asyncio.timeout(PIECE_TIMEOUT) as clock:
                message = await self._channel.receive()
        except TimeoutError as exc:
            if not clock.expired():
                raise
            raise DeadlineExceededError(
                f"the client sent nothing for {PIECE_TIMEOUT:.0f} s, with rows still to come"
            ) from exc
        return await self._take(message)

    async def _take(self, message: Message) -> Weights | None:
        """Take in a message; return the weights that were asked for, once they are complete."""
        record = message.record
        if isinstance(record, Rows):
            intake = self._intakes.get(record.kind)
            if intake is None or intake.complete:
                raise InvalidBatchError(f"the client sent more {record.kind[:32]!r} than were asked for")
            self.receiving = asyncio.get_running_loop().time() - self._opened
            hidden = message.tensor("hidden")
            intake.check(record, hidden)
            intake.add(await self._executor.decode(hidden))
            return None
        if self._weights is None:
            raise ProtocolError("the client sent weights that it was not asked for")
        assert isinstance(record, AdapterPart)
        return self._weights.take(record, message.tensors)

    async def send_rows(self, kind: str, rows: Tensor, codec: str) -> None:
        """Send raw ``rows`` in pieces, each encoded with ``codec``."""
        many, width = rows.shape
        row = width * ITEM_BYTES[rows.dtype]
        step = max(1, min(PIECE_BYTES // row, max(SMALL_PIECE_BYTES // row, -(-many // PIECES))))
        for first in range(0, many, step):
            piece = rows.rows(first, min(first + step, many))
            if codec != "raw":
                piece = await self._executor.encode(piece, codec)
            await self._channel.send(Rows(kind, first), piece)

    async def send_weights(self, tensors: Sequence[Tensor]) -> None:
        """Send gradients of an adapter's weights, as many to a message as fit well."""
        for part, last in adapter_parts(tensors):
            await self._channel.send(AdapterPart(last=last), *part)
