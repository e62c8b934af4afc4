"""One forward or backward pass on one server, as its client sees it: rows in pieces, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import attrs

from swarmcore.client.adapter_weights import AdapterWeights
from swarmcore.client.pass_codecs import Transfer
from swarmcore.errors import DeadlineExceededError, ProtocolError, SwarmError, UnavailableError
from swarmcore.routing.chain import Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.method import Protocol
from swarmcore.rpc.node import Node
from swarmcore.server.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL
from swarmcore.types import Address, ModelInfo
from swarmcore.wire.passes import (
    AdapterPart,
    AdapterWanted,
    BackwardDone,
    ForwardDone,
    InputsWanted,
    OpenBackward,
    OpenForward,
    Rows,
)
from swarmcore.wire.tensors import FLOATS, ITEM_BYTES, Tensor

PIECE_BYTES = 2**19
"""Rows travel in pieces of about so many bytes before they are encoded."""

Done = TypeVar("Done", ForwardDone, BackwardDone)


@attrs.frozen(eq=False)
class Batch:
    """What is common to all passes of some sequences."""

    lengths: tuple[int, ...]
    adapter: AdapterWeights | None = None
    reproducible: bool = False
    timeout: float = 120.0
    """Seconds for one pass on one server, all waiting included."""

    @property
    def rows(self) -> int:
        return sum(self.lengths)


@attrs.frozen(eq=False)
class Forwarded:
    """What a forward pass gave."""

    outputs: Tensor
    kept: bool
    """Whether the server said that it keeps activations for the way back."""
    seconds: float
    """Time that the server was at work on it."""
    up: Transfer
    down: Transfer


@attrs.frozen(eq=False)
class BackwardResult:
    """What a backward pass gave."""

    gradients: Tensor | None
    """Of the inputs."""
    weights: tuple[Tensor, ...]
    """Of the adapter's weights in the blocks of the stage."""
    seconds: float
    up: Transfer
    down: Transfer


async def forward(
    node: Node,
    model: ModelInfo,
    stage: Stage,
    batch: Batch,
    inputs: Tensor,
    *,
    keep: str = "",
    codec: str = "raw",
    answer_codec: str = "raw",
) -> Forwarded:
    """Run ``inputs``, raw ``[rows, hidden size]``, through the blocks of ``stage`` on its server.

    ``keep`` names the activations that the server may keep. Rows travel there in ``codec`` and back in
    ``answer_codec``. Raise the server's own error, `DeadlineExceededError` when it takes longer than
    ``batch.timeout``, `ProtocolError` for an answer that is none.
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
    )
    answers = _Answers("outputs", batch.rows, model.hidden_size)
    talk = _Pass(node, stage, batch, inputs, codec)
    done = await talk.run(FORWARD_PROTOCOL, opening, ("inputs", inputs, codec), answers, ForwardDone)
    up = Transfer(talk.sent, done.receiving)
    return Forwarded(answers.whole(), done.kept, done.seconds, up, answers.transfer)


async def backward(
    node: Node,
    model: ModelInfo,
    stage: Stage,
    batch: Batch,
    inputs: Tensor,
    gradients: Tensor,
    *,
    kept: str = "",
    wants_inputs: bool = True,
    wants_weights: bool = False,
    codec: str = "raw",
    inputs_codec: str = "raw",
    answer_codec: str = "raw",
) -> BackwardResult:
    """From ``gradients`` of a stage's outputs to those of its ``inputs`` and of the adapter's weights.

    ``inputs`` are sent, in ``inputs_codec``, when the server asks for them: when it does not have the
    activations ``kept``. Otherwise as `forward`.
    """
    opening = OpenBackward(
        model.fingerprint,
        stage.span.start,
        stage.span.end,
        batch.lengths,
        codec=answer_codec,
        deadline=batch.timeout,
        adapter=batch.adapter.name if batch.adapter else None,
        kept=kept,
        inputs=wants_inputs,
        weights=wants_weights,
        reproducible=batch.reproducible,
    )
    answers = _Answers("gradients", batch.rows if wants_inputs else 0, model.hidden_size)
    talk = _Pass(node, stage, batch, inputs, inputs_codec)
    done = await talk.run(BACKWARD_PROTOCOL, opening, ("gradients", gradients, codec), answers, BackwardDone)
    found = answers.whole() if wants_inputs else None
    up = Transfer(talk.sent, done.receiving)
    return BackwardResult(found, tuple(answers.weights), done.seconds, up, answers.transfer)


class _Answers:
    """Puts the pieces of an answer together."""

    def __init__(self, kind: str, rows: int, width: int) -> None:
        self.weights: list[Tensor] = []
        self._kind, self._rows, self._width = kind, rows, width
        self._dtype = ""
        self._values = bytearray()
        self._received = 0
        self._began = 0.0
        self.transfer = Transfer()
        """Of all pieces after the first, which may have waited for what was computed."""

    def arrived(self, hidden: Tensor, now: float) -> None:
        """A piece has come, still encoded."""
        if not self._received:
            self._began = now
        else:
            self.transfer = Transfer(self.transfer.nbytes + hidden.data.nbytes, now - self._began)

    def take(self, record: Rows, hidden: Tensor) -> None:
        many, width = hidden.shape if len(hidden.shape) == 2 else (0, 0)
        fits = record.first == self._received and many + record.first <= self._rows and width == self._width
        known = hidden.dtype == (self._dtype or hidden.dtype) and hidden.dtype in FLOATS
        if record.kind != self._kind or not fits or not known:
            raise ProtocolError(
                f"{many} rows of {record.kind} at {record.first}, {hidden.dtype}; expected {self._kind} from "
                f"{self._received} of {self._rows}"
            )
        if not self._dtype:
            self._dtype = hidden.dtype
            self._values = bytearray(self._rows * self._width * ITEM_BYTES[hidden.dtype])
        row = self._width * ITEM_BYTES[hidden.dtype]
        self._values[row * record.first : row * (record.first + many)] = hidden.data
        self._received += many

    def whole(self) -> Tensor:
        if self._received < self._rows:
            raise ProtocolError(f"the server sent {self._received} of {self._rows} rows of {self._kind}")
        return Tensor("hidden", self._dtype, (self._rows, self._width), memoryview(self._values))


class _Pass:
    """The conversation of one pass."""

    def __init__(self, node: Node, stage: Stage, batch: Batch, inputs: Tensor, inputs_codec: str) -> None:
        self._node, self._stage, self._batch = node, stage, batch
        self._inputs, self._inputs_codec = inputs, inputs_codec
        self._to_send: asyncio.Queue[Callable[[Channel], Awaitable[None]]] = asyncio.Queue()
        self._failure: SwarmError | None = None
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
        addresses = [Address.parse(url) for url in self._stage.server.addresses]
        timeout = self._batch.timeout
        self._to_send.put_nowait(partial(self._send_rows, *rows))
        try:
            async with asyncio.timeout(timeout) as clock:
                async with await self._node.open(addresses, protocol, opening, timeout=timeout) as channel:
                    talking = asyncio.create_task(self._talk(channel), name="pass rows")
                    try:
                        while not isinstance(record := await self._next(channel, answers), end):
                            pass
                        return record
                    finally:
                        talking.cancel()
                        await asyncio.gather(talking, return_exceptions=True)
        except TimeoutError as exc:
            if not clock.expired():
                raise
            raise DeadlineExceededError(
                f"{self._stage} did not finish a batch of {self._batch.rows} tokens in {timeout:.0f} s"
            ) from exc

    async def _next(self, channel: Channel, answers: _Answers) -> Any:
        """Take one message, and do what it asks for."""
        try:
            message = await channel.receive()
        except SwarmError as exc:
            raise self._failure or exc from None
        record = message.record
        match record:
            case Rows():
                hidden = message.tensor("hidden")
                answers.arrived(hidden, asyncio.get_running_loop().time())
                # What takes long to decode is decoded in a thread.
                raw = hidden if hidden.codec == "raw" else await asyncio.to_thread(hidden.decode)
                answers.take(record, raw)
            case AdapterPart():
                answers.weights += message.tensors
            case InputsWanted():
                self._to_send.put_nowait(partial(self._send_rows, "inputs", self._inputs, self._inputs_codec))
            case AdapterWanted() if self._batch.adapter is not None:
                blocks = [block for block in record.blocks if block in self._stage.span]
                self._to_send.put_nowait(partial(self._batch.adapter.send, blocks=blocks))
            case AdapterWanted():
                raise ProtocolError("the server asked for an adapter that the pass does not have")
        return record

    async def _talk(self, channel: Channel) -> None:
        try:
            while True:
                await (await self._to_send.get())(channel)
        except SwarmError as exc:
            # When the stream broke, what is received says why; else this is why.
            self._failure = None if isinstance(exc, UnavailableError) else exc
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
