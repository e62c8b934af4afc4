"""An inference session over the network: streams to every server of a chain, steps pipelined through it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from types import TracebackType
from typing import Self

import attrs

from swarmcore.errors import (
    DeadlineExceededError,
    InputError,
    InvalidStepError,
    ProtocolError,
    RemoteFaultError,
    SessionLostError,
    SwarmError,
)
from swarmcore.routing.chain import Chain
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.protocols import INFERENCE_PROTOCOL
from swarmcore.session.laps import Chunk, Lap, Reply, SessionLaps
from swarmcore.types import Address, ModelInfo, short
from swarmcore.wire.failure import to_error
from swarmcore.wire.framing import Message
from swarmcore.wire.messages import Hop, OpenSession, SessionOpened, StepFailed, StepOutput
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 8
"""Prefill chunks of one session under way in the chain."""


@attrs.frozen(kw_only=True)
class SessionOptions:
    """How a session travels."""

    chunk_rows: int = 256
    """Longest piece, in tokens over all sequences, in which a long prompt goes through the chain."""
    codec: str = "raw"
    """How hidden states are encoded on the way: ``"raw"``; ``"int8"``, half of bfloat16's bytes and 1 to 2 %
    off; either with ``"+zstd"``, which is lossless and pays on links under some 50 MB/s."""
    open_timeout: float = 40.0
    """Seconds to wait for every server to grant the session."""
    step_timeout: float = 60.0
    """Seconds to wait for one lap of one chunk."""


@attrs.define
class _Flight:
    """A chunk under way."""

    chunk: Chunk
    lap: Lap
    output: asyncio.Future[Tensor]


class InferenceSession:
    """Runs new tokens of some sequences through all blocks of a model; the servers keep the attention caches.

    Made by `open_session`; close it, or use it as an async context manager, to free the caches. One lap at a
    time: `step` must have returned before it is called again.
    """

    def __init__(
        self,
        model: ModelInfo,
        chain: Chain,
        hops: Sequence[Hop],
        channels: Sequence[Channel],
        *,
        sequences: int,
        carried: Collection[int] = (),
        options: SessionOptions,
    ) -> None:
        self.model = model
        self.chain = chain
        self.sequences = sequences
        self._options = options
        self._laps = SessionLaps(hops, sequences=sequences, carried=carried)
        self._channels = tuple(channels)
        self._flights: dict[int, _Flight] = {}
        self._broken: SwarmError | None = None
        self._stepping = False
        self._listeners = [
            asyncio.create_task(self._listen(stage, channel)) for stage, channel in enumerate(channels)
        ]

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens of each sequence in the servers' caches."""
        return self._laps.positions

    def __repr__(self) -> str:
        state = "closed" if self._broken else f"pos {','.join(map(str, self.positions))}"
        return f"<InferenceSession {self.model.name} {self.chain} · {state}>"

    async def step(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        reply: Reply = "last",
    ) -> Tensor:
        """Send new tokens through the chain and return what comes out of the last block.

        ``hidden`` is ``[sum(lengths), hidden size]``, the sequences' new tokens one after the other, without
        padding; a length of 0 leaves a sequence alone. ``starts`` default to `positions`; a lower start
        first rolls that sequence back. With ``reply="last"`` the result has one row for each sequence of
        length above 0, with ``"all"`` one for every token.

        Raise `InvalidStepError` for shapes and positions that do not fit, `BusyError` when a server had no
        room or time, `UnavailableError` when a server is gone; after the latter the session is of no more
        use.
        """
        if self._broken is not None:
            raise self._broken
        if self._stepping:
            raise InvalidStepError("a step of this session is still under way; await it first")
        expected = (sum(lengths), self.model.hidden_size)
        if hidden.shape != expected:
            raise InvalidStepError(f"hidden states have shape {hidden.shape}, expected {expected}")
        lap = self._laps.begin(lengths, starts, reply, chunk_rows=self._options.chunk_rows)
        self._stepping = True
        try:
            outputs = await self._run(lap, hidden)
        except BaseException:
            self._laps.abandon(lap)
            raise
        finally:
            self._stepping = False
            self._flights.clear()
        self._laps.commit(lap)
        return outputs[0] if len(outputs) == 1 else _join(lap, outputs)

    def rollback(self, positions: Sequence[int]) -> None:
        """Forget what is cached beyond ``positions``; the servers do so with the next step.

        Raise `InvalidStepError` for a position that is not cached.
        """
        self._laps.rollback(positions)

    async def close(self) -> None:
        """End the session on every server. Harmless when repeated."""
        if self._broken is None:
            self._broken = SessionLostError("the session was closed on this side")
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, lap: Lap, hidden: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        under_way: deque[_Flight] = deque()
        for chunk in lap.chunks:
            if len(under_way) == CHUNKS_IN_FLIGHT:
                outputs.append(await self._landing(under_way.popleft()))
            flight = _Flight(chunk, lap, asyncio.get_running_loop().create_future())
            self._flights[chunk.step] = flight
            await self._send(0, flight, _rows(hidden, chunk).encode(self._options.codec))
            under_way.append(flight)
        while under_way:
            outputs.append(await self._landing(under_way.popleft()))
        return outputs

    async def _landing(self, flight: _Flight) -> Tensor:
        try:
            async with asyncio.timeout(self._options.step_timeout):
                return await flight.output
        except TimeoutError as exc:
            raise DeadlineExceededError(
                f"no answer from {self.chain} within {self._options.step_timeout:.0f} s"
            ) from exc

    async def _send(self, stage: int, flight: _Flight, hidden: Tensor) -> None:
        step = self._laps.step_for(
            stage, flight.chunk, flight.lap, codec=self._options.codec, deadline=self._options.step_timeout
        )
        try:
            async with asyncio.timeout(self._options.step_timeout):
                await self._channels[stage].send(step, hidden)
        except TimeoutError as exc:
            raise DeadlineExceededError(f"{self.chain.stages[stage]} does not take in the step") from exc

    async def _listen(self, stage: int, channel: Channel) -> None:
        """Take what one server sends: outputs, refusals, or the end of its stream."""
        try:
            while True:
                await self._heard(stage, await channel.receive())
        except SwarmError as exc:
            error = self._located(stage, exc)
            logger.info("session over %s broke: %s", self.chain, error)
            self._break(error)
        except Exception as exc:
            logger.exception("session over %s broke", self.chain)
            self._break(RemoteFaultError(f"{self.chain.stages[stage]}: {exc}"))

    async def _heard(self, stage: int, message: Message) -> None:
        record = message.record
        if not isinstance(record, StepOutput | StepFailed):
            raise ProtocolError(f"unexpected {message.kind} in the middle of a session")
        flight = self._flights.get(record.step)
        if flight is None or flight.output.done():
            return
        if isinstance(record, StepFailed):
            error = to_error(record.failure, self.chain.stages[stage].server.peer)
            flight.output.set_exception(self._located(stage, error))
            # Whether or not anyone still waits for this chunk, an earlier one may have failed the lap.
            flight.output.exception()
            return
        carry_to = self._laps.received(stage, record)
        hidden = message.tensor("hidden")
        if carry_to is None:
            flight.output.set_result(hidden)
        else:
            await self._send(carry_to, flight, hidden)

    def _located(self, stage: int, error: SwarmError) -> SwarmError:
        """``error`` with the server and blocks it comes from in its message."""
        located = type(error)(f"{self.chain.stages[stage]}: {error.message}", **error.details)
        located.origin = error.origin
        return located

    def _break(self, error: SwarmError) -> None:
        if self._broken is None:
            self._broken = error
        for flight in self._flights.values():
            if not flight.output.done():
                flight.output.set_exception(error)
                flight.output.exception()


async def open_session(
    node: Node,
    plan: Callable[[frozenset[str]], Chain],
    model: ModelInfo,
    *,
    sequences: int,
    tokens: int = 0,
    options: SessionOptions | None = None,
    attempts: int = 3,
) -> InferenceSession:
    """Open a session on every server of a chain, all at once.

    ``plan`` gives a chain that avoids the given peers; a server that refuses or does not answer is avoided in
    the next of ``attempts``. Raise what ``plan`` raises when no chain is left, and `CacheFullError` or the
    last server's error when the attempts are used up.
    """
    options = options or SessionOptions()
    avoided: set[str] = set()
    failure: SwarmError | None = None
    for _ in range(attempts):
        try:
            chain = plan(frozenset(avoided))
        except SwarmError as exc:
            raise (failure or exc) from exc
        hops = [
            Hop(
                stage.server.peer,
                stage.server.addresses,
                secrets.token_hex(16),
                stage.span.start,
                stage.span.end,
            )
            for stage in chain.stages
        ]
        results = await _open_all(node, model, hops, sequences=sequences, tokens=tokens, options=options)
        failures = {hop.peer: r for hop, r in zip(hops, results, strict=True) if isinstance(r, SwarmError)}
        opened = [result for result in results if not isinstance(result, SwarmError)]
        if not failures:
            return InferenceSession(
                model,
                chain,
                hops,
                [channel for channel, _ in opened],
                sequences=sequences,
                carried=[i for i, (_, granted) in enumerate(opened) if not granted.next_hop_reachable],
                options=options,
            )
        await asyncio.gather(*(channel.close() for channel, _ in opened))
        peer, failure = next(iter(failures.items()))
        logger.info("%s refused a session: %s", short(peer), failure)
        if isinstance(failure, InputError):
            break
        avoided.update(failures)
    assert failure is not None
    raise failure


async def _open_all(
    node: Node, model: ModelInfo, hops: Sequence[Hop], *, sequences: int, tokens: int, options: SessionOptions
) -> list[tuple[Channel, SessionOpened] | SwarmError]:
    async def open_one(hop: Hop, next_hop: Hop | None) -> tuple[Channel, SessionOpened]:
        opening = OpenSession(hop.session, model.fingerprint, hop.start, hop.end, sequences, tokens, next_hop)
        addresses = [Address.parse(url) for url in hop.addresses]
        channel = await node.open(addresses, INFERENCE_PROTOCOL, opening, timeout=options.open_timeout)
        try:
            message = await channel.receive()
            if not isinstance(message.record, SessionOpened):
                raise ProtocolError(f"server {hop.peer} answered {message.kind} to the opening of a session")
        except BaseException:
            channel.abort("the session was not opened")
            raise
        return channel, message.record

    async def guarded(hop: Hop, next_hop: Hop | None) -> tuple[Channel, SessionOpened] | SwarmError:
        try:
            async with asyncio.timeout(options.open_timeout):
                return await open_one(hop, next_hop)
        except TimeoutError:
            return DeadlineExceededError(
                f"{short(hop.peer)} did not grant a session in {options.open_timeout:.0f} s"
            )
        except SwarmError as exc:
            return exc

    opening: list[Awaitable[tuple[Channel, SessionOpened] | SwarmError]] = [
        guarded(hop, hops[i + 1] if i + 1 < len(hops) else None) for i, hop in enumerate(hops)
    ]
    return list(await asyncio.gather(*opening))


def _rows(hidden: Tensor, chunk: Chunk) -> Tensor:
    if chunk.rows == hidden.shape[0]:
        return hidden
    width = hidden.shape[1] * ITEM_BYTES[hidden.dtype]
    data = hidden.data.cast("B")[chunk.first_row * width : (chunk.first_row + chunk.rows) * width]
    return Tensor(hidden.name, hidden.dtype, (chunk.rows, hidden.shape[1]), data)


def _join(lap: Lap, outputs: Sequence[Tensor]) -> Tensor:
    """The rows of a lap from its chunks' outputs."""
    decoded = [output.decode() for output in outputs]
    width = decoded[0].data.nbytes // max(decoded[0].shape[0], 1)
    rows: list[memoryview] = []
    last: dict[int, memoryview] = {}
    for chunk, output in zip(lap.chunks, decoded, strict=True):
        data = output.data.cast("B")
        if lap.reply == "all":
            rows.append(data)
            continue
        # Each chunk answers with the last row it has of every sequence; a later chunk's row replaces it.
        for row, sequence in enumerate(i for i, length in enumerate(chunk.lengths) if length):
            last[sequence] = data[row * width : (row + 1) * width]
    joined = memoryview(bytearray().join(rows or [last[sequence] for sequence in sorted(last)]))
    shape = (joined.nbytes // width, decoded[0].shape[1])
    return attrs.evolve(decoded[0], shape=shape, data=joined)
