"""One forward or backward pass on one server, as its client sees it: rows in pieces, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import attrs

from swarmcore.client.adapters import AdapterWeights
from swarmcore.errors import (
    InternalError,
    ProtocolError,
    SwarmError,
    UnavailableError,
)
from swarmcore.routing.chain import Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.tasks import deadline_after, running
from swarmcore.types import ModelInfo, ServerInfo
from swarmcore.wire.forward_backward import (
    AdapterPart,
    AdapterWanted,
    BackwardDone,
    ForwardDone,
    InputsWanted,
    OpenBackward,
    OpenForward,
    PassProgress,
    Rows,
    RowsIntake,
)
from swarmcore.wire.method import Protocol
from swarmcore.wire.protocols import (
    BACKWARD_OF_PADDING_PROTOCOL,
    BACKWARD_PROTOCOL,
    FORWARD_OF_PADDING_PROTOCOL,
    FORWARD_PROTOCOL,
)
from swarmcore.wire.tensors import FLOATS, ITEM_BYTES, Tensor

logger = logging.getLogger(__name__)

MOST = 60.0
"""Times its timeout that a pass may take in all, whatever progress its server claims."""

PIECE_BYTES = 2**15
"""Rows travel in pieces of about so many bytes before they are encoded. Small ones, since a server
does not wait for the next one for ever, and all passes under way share what a slow link carries."""

Done = TypeVar("Done", ForwardDone, BackwardDone)


@attrs.frozen(eq=False)
class MicroBatch:
    """What is common to all passes of some sequences."""

    lengths: tuple[int, ...]
    adapter: AdapterWeights | None = None
    reproducible: bool = False
    timeout: float = 120.0
    """Seconds without progress of a pass on one server after which it is given up."""
    padding: bool = False
    """The rows attend to nothing, as padding before a sequence does."""

    @property
    def rows(self) -> int:
        return sum(self.lengths)


@attrs.frozen
class Transfer:
    """Rows that went over a link."""

    nbytes: int = 0
    """As encoded."""
    seconds: float = 0.0


@attrs.frozen(eq=False, kw_only=True)
class PassResult:
    """What every pass tells of its server and of the link to it."""

    seconds: float
    """Time that the server was at work on it."""
    up: Transfer
    down: Transfer


@attrs.frozen(eq=False, kw_only=True)
class ForwardResult(PassResult):
    """What a forward pass gave."""

    outputs: Tensor
    kept: bool
    """Whether the server said that it keeps activations for the backward pass."""


@attrs.frozen(eq=False, kw_only=True)
class BackwardResult(PassResult):
    """What a backward pass gave."""

    gradients: Tensor | None
    """Of the inputs."""
    weights: tuple[Tensor, ...]
    """Of the adapter's weights in the blocks of the stage."""


async def forward(
    node: Node,
    model: ModelInfo,
    stage: Stage,
    batch: MicroBatch,
    inputs: Tensor,
    *,
    keep: str = "",
    codec: str = "raw",
    answer_codec: str = "raw",
) -> ForwardResult:
    """Run ``inputs``, raw ``[rows, hidden size]``, through the blocks of ``stage`` on its server.

    ``keep`` names the activations that the server may keep. Rows travel there in ``codec`` and back in
    ``answer_codec``. Raise the server's own error, `DeadlineExceededError` when it gets no further for
    ``batch.timeout`` seconds, `ProtocolError` for an answer that is none.
    """
    opening = OpenForward(
        model.fingerprint,
        stage.span.start,
        stage.span.end,
        batch.lengths,
        codec=answer_codec,
        deadline=batch.timeout,
        adapter=batch.adapter.name if batch.adapter else None,
        keep=keep,
        reproducible=batch.reproducible,
        padding=batch.padding,
        progress=True,
    )
    answers = _Answers(RowsIntake("outputs", batch.rows, model.hidden_size, ProtocolError))
    call = _PassCall(node, stage, batch, inputs, codec)
    protocol = FORWARD_OF_PADDING_PROTOCOL if batch.padding else FORWARD_PROTOCOL
    done = await call.run(protocol, opening, ("inputs", inputs, codec), answers, ForwardDone)
    return ForwardResult(
        outputs=answers.rows.whole(),
        kept=done.kept,
        seconds=done.seconds,
        up=Transfer(call.sent, done.receiving),
        down=answers.transfer,
    )


async def backward(
    node: Node,
    model: ModelInfo,
    stage: Stage,
    batch: MicroBatch,
    inputs: Tensor,
    gradients: Tensor,
    *,
    kept_as: str = "",
    wants_inputs: bool = True,
    wants_weights: bool = False,
    codec: str = "raw",
    inputs_codec: str = "raw",
    answer_codec: str = "raw",
) -> BackwardResult:
    """From ``gradients`` of a stage's outputs to those of its ``inputs`` and of the adapter's weights.

    ``inputs`` are sent, in ``inputs_codec``, when the server asks for them: when it does not have the
    activations kept as ``kept_as``. Otherwise as `forward`.
    """
    opening = OpenBackward(
        model.fingerprint,
        stage.span.start,
        stage.span.end,
        batch.lengths,
        codec=answer_codec,
        deadline=batch.timeout,
        adapter=batch.adapter.name if batch.adapter else None,
        kept=kept_as,
        inputs=wants_inputs,
        weights=wants_weights,
        reproducible=batch.reproducible,
        padding=batch.padding,
        progress=True,
    )
    rows = RowsIntake("gradients", batch.rows if wants_inputs else 0, model.hidden_size, ProtocolError)
    wanted = (
        batch.adapter.tensors_of(range(stage.span.start, stage.span.end))
        if batch.adapter and wants_weights
        else ()
    )
    answers = _Answers(rows, wanted)
    call = _PassCall(node, stage, batch, inputs, inputs_codec)
    protocol = BACKWARD_OF_PADDING_PROTOCOL if batch.padding else BACKWARD_PROTOCOL
    done = await call.run(protocol, opening, ("gradients", gradients, codec), answers, BackwardDone)
    return BackwardResult(
        gradients=rows.whole() if wants_inputs else None,
        weights=tuple(answers.weights),
        seconds=done.seconds,
        up=Transfer(call.sent, done.receiving),
        down=answers.transfer,
    )


async def as_computed(rows: Tensor, server: ServerInfo) -> Tensor:
    """Raw ``rows`` in the dtype that ``server`` computes in, where that is smaller.

    Nothing is lost: it would round them itself. Its answers come in that dtype too.
    """
    if ITEM_BYTES.get(server.dtype, math.inf) >= ITEM_BYTES[rows.dtype] or server.dtype not in FLOATS:
        return rows
    try:
        from swarmcore.executor.torch.wire_tensors import cast
    except ImportError:  # torch is not installed: they travel as they are
        return rows
    return await asyncio.to_thread(cast, rows, server.dtype)


class _Answers:
    """What comes in answer to a pass."""

    def __init__(self, rows: RowsIntake, weights: Iterable[Tensor] = ()) -> None:
        """Gradients are to come of all ``weights``."""
        self.rows = rows
        self.weights: list[Tensor] = []
        self._wanted = {tensor.name: tensor.shape for tensor in weights}
        self._began: float | None = None
        self.transfer = Transfer()
        """Of all pieces after the first, which may have waited for what was computed."""

    def arrived(self, hidden: Tensor, now: float) -> None:
        """A piece has come, still encoded."""
        if self._began is None:
            self._began = now
        else:
            self.transfer = Transfer(self.transfer.nbytes + hidden.data.nbytes, now - self._began)

    def take_weights(self, tensors: Iterable[Tensor]) -> None:
        """Gradients of weights have come."""
        for tensor in tensors:
            if self._wanted.pop(tensor.name, None) != tensor.shape or tensor.dtype not in FLOATS:
                raise ProtocolError(
                    f"a gradient {list(tensor.shape)} of {tensor.name!r} came, which was not wanted"
                )
            self.weights.append(tensor)

    def check_complete(self) -> None:
        """The server says that all has been sent."""
        if not self.rows.complete or self._wanted:
            missing = ", ".join(self._wanted) or self.rows.kind
            raise ProtocolError(f"the server ended the pass without all that was wanted: {missing[:200]}")


class _PassCall:
    """The conversation of one pass."""

    def __init__(
        self, node: Node, stage: Stage, batch: MicroBatch, inputs: Tensor, inputs_codec: str
    ) -> None:
        self._node, self._stage, self._batch = node, stage, batch
        self._inputs, self._inputs_codec = inputs, inputs_codec
        self._to_send: asyncio.Queue[Callable[[Channel], Awaitable[None]]] = asyncio.Queue()
        self._failure: SwarmError | None = None
        self._clock: asyncio.Timeout | None = None
        self._give_up = math.inf
        self._work = -1
        self.sent = 0
        """Bytes of rows, as encoded."""

    async def run(
        self,
        protocol: Protocol,
        opening: OpenForward | OpenBackward,
        rows: tuple[str, Tensor, str],
        answers: _Answers,
        end: type[Done],
    ) -> Done:
        timeout = self._batch.timeout
        self._give_up = asyncio.get_running_loop().time() + MOST * timeout
        self._to_send.put_nowait(partial(self._send_rows, *rows))
        stuck = f"{self._stage} got no further with a batch of {self._batch.rows} tokens in {timeout:.0f} s"
        async with deadline_after(timeout, stuck) as self._clock:
            addresses = self._stage.server.dialable
            channel = await self._node.open(addresses, protocol, opening, timeout=timeout)
            async with channel, running(self._send_queued(channel), "rows of a batch"):
                while not isinstance(record := await self._next(channel, answers), end):
                    pass
                answers.check_complete()
                return record

    def _progressed(self) -> None:
        """The time of the pass begins anew, unless it is late already."""
        now = asyncio.get_running_loop().time()
        if self._clock is not None and not self._clock.expired():
            with contextlib.suppress(RuntimeError):
                self._clock.reschedule(min(now + self._batch.timeout, self._give_up))

    async def _next(self, channel: Channel, answers: _Answers) -> Any:
        """Take one message, and do what it asks for."""
        try:
            message = await channel.receive()
        except SwarmError as exc:
            raise self._failure or exc from None
        record = message.record
        if not isinstance(record, PassProgress) or record.work > self._work:
            self._progressed()
        match record:
            case PassProgress():
                self._work = record.work
            case Rows():
                hidden = message.tensor("hidden")
                answers.arrived(hidden, asyncio.get_running_loop().time())
                answers.rows.check(record, hidden)
                # What takes long to decode is decoded in a thread.
                answers.rows.add(hidden if hidden.codec == "raw" else await asyncio.to_thread(hidden.decode))
            case AdapterPart():
                answers.take_weights(message.tensors)
            case InputsWanted():
                self._to_send.put_nowait(partial(self._send_rows, "inputs", self._inputs, self._inputs_codec))
            case AdapterWanted() if self._batch.adapter is not None:
                blocks = [block for block in record.blocks if block in self._stage.span]
                send = partial(self._batch.adapter.send, blocks=blocks, progressed=self._progressed)
                self._to_send.put_nowait(send)
            case AdapterWanted():
                raise ProtocolError("the server asked for an adapter that the pass does not have")
        return record

    async def _send_queued(self, channel: Channel) -> None:
        try:
            while True:
                await (await self._to_send.get())(channel)
        except SwarmError as exc:
            # When the stream broke, what is received says why; else this is why.
            self._failure = None if isinstance(exc, UnavailableError) else exc
            channel.abort("the client could not send its rows")
        except Exception as exc:
            logger.exception("the rows of a pass could not be sent")
            self._failure = InternalError(f"the rows of a pass could not be sent: {exc!r}")
            channel.abort("the client could not send its rows")

    async def _send_rows(self, kind: str, rows: Tensor, codec: str, channel: Channel) -> None:
        many, width = rows.shape
        step = max(1, PIECE_BYTES // (width * ITEM_BYTES[rows.dtype]))
        for first in range(0, many, step):
            piece = rows.rows(first, min(first + step, many))
            if codec != "raw":
                piece = await asyncio.to_thread(piece.encode, codec)
            self.sent += piece.data.nbytes
            await channel.send(Rows(kind, first), piece)
            self._progressed()
