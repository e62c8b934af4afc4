"""The channel of one forward or backward pass, from the server's side: rows in pieces, both ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import attrs

from swarmcore.engine.training import TrainingRequest
from swarmcore.errors import DeadlineExceededError, InvalidBatchError, ProtocolError
from swarmcore.executor.base import BlockExecutor
from swarmcore.resources import Reservation
from swarmcore.rpc.channel import Channel
from swarmcore.server.adapters import Weights, WeightsIntake
from swarmcore.tasks import loop_time
from swarmcore.types import Span
from swarmcore.wire.forward_backward import (
    AdapterPart,
    AdapterWanted,
    InputsWanted,
    Rows,
    RowsIntake,
    adapter_parts,
)
from swarmcore.wire.framing import Message
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

PIECE_BYTES = 2 * 2**20
"""Rows go out in pieces of at most about so many bytes, before they are encoded."""

PIECES = 4
"""Rows go out in so many pieces at least, unless they are small: how far apart these arrive tells the client
the rate of the link (`swarmcore.routing.link_codec`)."""

SMALL_PIECE_BYTES = 2**14

PIECE_TIMEOUT = 60.0
"""Seconds for something to come from a client that has rows to send: until then its passes take room that
others could have."""


@attrs.define(eq=False)
class RowSender:
    """A client that sends rows of one pass or of several, which share its link in whatever order."""

    heard: float
    """When something came from it last, in loop time."""


@attrs.define(eq=False)
class RenewableDeadline:
    """How long a pass may take: ``deadline`` seconds, from when it last got on if it is to be ``prolonged``.

    Only what is computed here prolongs it for ever; what a client sends or takes, for ``most`` seconds.
    """

    _request: TrainingRequest
    _clock: asyncio.Timeout
    _deadline: float
    _most: float
    prolonged: bool
    _last: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._last = loop_time() + self._most

    def moved(self) -> None:
        """Some rows have come, or gone."""
        self._extend(min(loop_time() + self._deadline, self._last))

    def computed(self) -> None:
        """The engine got on."""
        now = loop_time()
        self._last = now + self._most
        self._extend(now + self._deadline)

    def _extend(self, until: float) -> None:
        if self.prolonged and not self._clock.expired():
            self._request.extend(until)
            with contextlib.suppress(RuntimeError):  # it is just ending
                self._clock.reschedule(until)


@attrs.define(eq=False)
class ForwardBackwardChannel:
    """Receives what one pass needs, in whichever order it comes, and sends what comes of it."""

    _channel: Channel
    _executor: BlockExecutor
    _rows: int
    _sender: RowSender
    """The same object for all passes of a client."""
    _reserved: Reservation
    """In which its rows are counted."""
    deadline: RenewableDeadline
    receiving: float = attrs.field(default=0.0, init=False)
    """Seconds from the opening until the last rows that have come."""
    _intakes: dict[str, RowsIntake] = attrs.field(factory=dict, init=False)
    _weights: WeightsIntake | None = attrs.field(default=None, init=False)
    _opened: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._opened = self._sender.heard = loop_time()

    def expect(self, kind: str) -> None:
        """Rows of this kind are to come."""
        self._intakes[kind] = RowsIntake(
            kind, self._rows, self._executor.model.hidden_size, InvalidBatchError
        )

    async def ask_inputs(self) -> None:
        """Have the client send the inputs."""
        self.expect("inputs")
        await self._channel.send(InputsWanted())

    async def weights(self, span: Span, intake: WeightsIntake) -> Weights:
        """Have the client send its adapter's weights for ``span``; rows that come before are taken in."""
        self._weights = intake
        await self._channel.send(AdapterWanted(tuple(span)))
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
        quiet_since = loop_time()
        while True:
            try:
                async with asyncio.timeout_at(quiet_since + PIECE_TIMEOUT) as clock:
                    message = await self._channel.receive()
            except TimeoutError as exc:
                if not clock.expired():
                    raise
                if self._sender.heard > quiet_since:  # it is busy with others of its passes
                    quiet_since = self._sender.heard
                    continue
                raise DeadlineExceededError(
                    f"the client sent nothing for {PIECE_TIMEOUT:.0f} s, with rows still to come"
                ) from exc
            self._sender.heard = loop_time()
            self.deadline.moved()
            return await self._take(message)

    async def _take(self, message: Message) -> Weights | None:
        """Take in a message; return the weights that were asked for, once they are complete."""
        record = message.record
        if isinstance(record, Rows):
            intake = self._intakes.get(record.kind)
            if intake is None or intake.complete:
                raise InvalidBatchError(f"the client sent more {record.kind[:32]!r} than were asked for")
            self.receiving = loop_time() - self._opened
            hidden = message.tensor("hidden")
            intake.check(record, hidden)
            self._reserved.resize(self._reserved.amount + hidden.decoded_nbytes)
            intake.add(await self._executor.decode(hidden))
            return None
        if self._weights is None:
            raise ProtocolError("the client sent weights that it was not asked for")
        assert isinstance(record, AdapterPart)
        return await self._weights.take(record, message.tensors)

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
            self.deadline.moved()

    async def send_weights(self, tensors: Sequence[Tensor]) -> None:
        """Send gradients of an adapter's weights, as many to a message as fit well."""
        for part, last in adapter_parts(tensors):
            await self._channel.send(AdapterPart(last=last), *part)
            self.deadline.moved()
