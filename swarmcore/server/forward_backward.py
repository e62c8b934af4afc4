"""The forward and backward protocols on a server."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from swarmcore.engine.engine import Engine
from swarmcore.engine.training import TrainingLimits, TrainingRequest
from swarmcore.engine.validation import check_codec
from swarmcore.errors import InvalidBatchError
from swarmcore.executor.base import TrainingBatch
from swarmcore.resources import Resource, ResourceManager
from swarmcore.rpc.channel import Channel
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.config import ACTIVATION_BUDGET, ServerConfig
from swarmcore.server.forward_backward_channel import ForwardBackwardChannel, RenewableDeadline, Sender
from swarmcore.server.span_service import SpanService
from swarmcore.tasks import deadline_after, running
from swarmcore.types import ModelInfo, PeerId, Span
from swarmcore.wire.forward_backward import BackwardDone, ForwardDone, OpenBackward, OpenForward, PassProgress
from swarmcore.wire.tensors import Tensor

MAX_DEADLINE = 900.0
"""Longest deadline, in seconds, that a client may ask for; more is cut to this."""

LOOK = 2.0
"""Seconds between two looks whether a pass, or those before it, got on."""

_NAME = re.compile(r"[0-9a-f]{32}|")


def training_limits(config: ServerConfig) -> TrainingLimits:
    """What a server's settings allow forward and backward passes."""
    budget = config.activation_budget
    return TrainingLimits(
        max_tokens=config.max_pass_tokens,
        activation_budget=ACTIVATION_BUDGET if budget is None else budget,
    )


class ForwardBackwardService(SpanService):
    """Serves `FORWARD_PROTOCOL` and `BACKWARD_PROTOCOL` with one engine."""

    new_work = "passes"

    def __init__(
        self,
        engine: Engine,
        model: ModelInfo,
        span: Span,
        adapters: AdapterStore,
        resources: ResourceManager | None = None,
    ) -> None:
        """``resources`` counts the rows that clients send."""
        super().__init__(engine, model, span, adapters)
        self._resources = resources or ResourceManager()
        self.under_way = 0
        """Passes that are served now."""
        self._senders: WeakValueDictionary[PeerId, Sender] = WeakValueDictionary()

    async def drain(self, seconds: float, *, keep: Span | None = None) -> None:
        """Refuse new passes, and wait for up to ``seconds`` until those under way are through.

        With ``keep``, only those that need blocks outside of it.
        """
        self.keep_only(keep)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._engine.training.drain(keep)

    async def end(self, *, keep: Span | None = None) -> None:
        """End the passes that need blocks outside of ``keep``, after `drain` gave them time."""
        await self._engine.training.end(keep)

    async def forward(self, channel: Channel) -> None:
        """Handle one channel of the forward protocol."""
        opening: OpenForward = channel.opening.record
        async with self._turn(channel, opening) as (turn, talk):
            talk.expect("inputs")
            async with self._adapters.obtain(
                channel.remote, opening.adapter, turn.span, talk.weights
            ) as adapter:
                rows = await talk.rows("inputs")
                batch = TrainingBatch(
                    turn.span, turn.lengths, rows, adapter, opening.reproducible, opening.padding
                )
                async with self._prolonging(talk, channel):
                    outputs, kept, seconds = await turn.forward(batch, keep=opening.keep)
            await talk.send_rows("outputs", outputs, opening.codec)
            await channel.send(ForwardDone(kept, seconds, talk.receiving))

    async def backward(self, channel: Channel) -> None:
        """Handle one channel of the backward protocol."""
        opening: OpenBackward = channel.opening.record
        async with self._turn(channel, opening) as (turn, talk):
            talk.expect("gradients")
            async with self._adapters.obtain(
                channel.remote, opening.adapter, turn.span, talk.weights
            ) as adapter:
                batch = TrainingBatch(
                    turn.span, turn.lengths, _NO_ROWS, adapter, opening.reproducible, opening.padding
                )
                reused = turn.reuse(opening.kept, batch)
                if not reused:
                    await talk.ask_inputs()
                gradients = await talk.rows("gradients")
                if not reused:
                    batch.hidden = await talk.rows("inputs")
                weights = opening.weights and adapter is not None
                async with self._prolonging(talk, channel):
                    done = await turn.backward(batch, gradients, inputs=opening.inputs, weights=weights)
            if done.gradients is not None:
                await talk.send_rows("gradients", done.gradients, opening.codec)
            if done.weights:
                await talk.send_weights(done.weights)
            await channel.send(BackwardDone(done.seconds, talk.receiving))

    @asynccontextmanager
    async def _prolonging(self, talk: ForwardBackwardChannel, channel: Channel) -> AsyncIterator[None]:
        """While a pass computes, begin its time anew whenever the engine gets on, and tell the client."""

        async def look() -> None:
            seen = self._engine.work
            while True:
                await asyncio.sleep(LOOK)
                if (work := self._engine.work) > seen:
                    seen = work
                    talk.patience.computed()
                    await channel.send(PassProgress(work))

        if not talk.patience.prolonged:
            yield  # the client gives up by itself, and does not expect to hear of it
            return
        async with running(look(), "progress of a pass"):
            yield

    @asynccontextmanager
    async def _turn(
        self, channel: Channel, opening: OpenForward | OpenBackward
    ) -> AsyncIterator[tuple[TrainingRequest, ForwardBackwardChannel]]:
        span = self._check(opening)
        deadline = min(opening.deadline, MAX_DEADLINE)
        late = (
            f"the pass of {sum(opening.lengths)} tokens was not through in {deadline:g} s; "
            f"send smaller batches, or allow it more time"
        )
        sender = self._senders.setdefault(channel.remote, Sender(asyncio.get_running_loop().time()))
        self.under_way += 1
        try:
            async with deadline_after(deadline, late) as clock:
                with (
                    self._engine.training.admit(channel.remote, span, opening.lengths, deadline) as turn,
                    self._resources.reserve(channel.remote, Resource.BYTES, 0) as held,
                ):
                    rows = sum(opening.lengths)
                    patience = RenewableDeadline(turn, clock, deadline, MAX_DEADLINE, opening.progress)
                    yield (
                        turn,
                        ForwardBackwardChannel(channel, self._engine.executor, rows, sender, held, patience),
                    )
            self.counters["passes_served"] += 1
        finally:
            self.under_way -= 1

    def _check(self, opening: OpenForward | OpenBackward) -> Span:
        span = self.check_opening(opening)
        if not opening.deadline > 0:
            raise InvalidBatchError(f"the deadline is {opening.deadline} seconds; expected more than 0")
        if opening.padding and not self._engine.executor.computes_padding:
            raise InvalidBatchError("this server's executor computes no padding; use another one")
        name = opening.keep if isinstance(opening, OpenForward) else opening.kept
        if not _NAME.fullmatch(name):
            raise InvalidBatchError(
                "activations are kept under a name of 32 hex digits, random for each pass"
            )
        check_codec(opening.codec)
        return span

    def __repr__(self) -> str:
        return f"<ForwardBackwardService {self.span} · {self.under_way} passes · {self._engine.training!r}>"


_NO_ROWS = Tensor("hidden", "float32", (0, 0), memoryview(b""))
"""In place of inputs that are not needed again."""
