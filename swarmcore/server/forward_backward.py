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
from swarmcore.executor.base import Adapter, TrainingBatch
from swarmcore.resources import Resource, ResourceManager
from swarmcore.rpc.channel import Channel
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.config import ACTIVATION_BUDGET, ServerConfig
from swarmcore.server.forward_backward_channel import ForwardBackwardChannel, RenewableDeadline, RowSender
from swarmcore.server.span_service import SpanService
from swarmcore.tasks import deadline_after, running
from swarmcore.types import ModelInfo, PeerId, Span
from swarmcore.wire.forward_backward import BackwardDone, ForwardDone, OpenBackward, OpenForward, PassProgress
from swarmcore.wire.tensors import Tensor

MAX_DEADLINE = 900.0
"""Longest deadline, in seconds, that a client may ask for; more is cut to this."""

PROGRESS_INTERVAL = 2.0
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
        self._senders: WeakValueDictionary[PeerId, RowSender] = WeakValueDictionary()

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
        async with self._admitted(channel, opening) as (request, transfer):
            transfer.expect("inputs")
            async with self._adapters.obtain(
                channel.remote, opening.adapter, request.span, transfer.weights
            ) as adapter:
                batch = _batch(request, opening, await transfer.rows("inputs"), adapter)
                async with self._reporting_progress(transfer, channel):
                    outputs, kept, seconds = await request.forward(batch, keep=opening.keep)
            await transfer.send_rows("outputs", outputs, opening.codec)
            await channel.send(ForwardDone(kept, seconds, transfer.receiving))

    async def backward(self, channel: Channel) -> None:
        """Handle one channel of the backward protocol."""
        opening: OpenBackward = channel.opening.record
        async with self._admitted(channel, opening) as (request, transfer):
            transfer.expect("gradients")
            async with self._adapters.obtain(
                channel.remote, opening.adapter, request.span, transfer.weights
            ) as adapter:
                batch = _batch(request, opening, _NO_ROWS, adapter)
                reused = request.reuse(opening.kept, batch)
                if not reused:
                    await transfer.ask_inputs()
                gradients = await transfer.rows("gradients")
                if not reused:
                    batch.hidden = await transfer.rows("inputs")
                weights = opening.weights and adapter is not None
                async with self._reporting_progress(transfer, channel):
                    done = await request.backward(batch, gradients, inputs=opening.inputs, weights=weights)
            if done.gradients is not None:
                await transfer.send_rows("gradients", done.gradients, opening.codec)
            if done.weights:
                await transfer.send_weights(done.weights)
            await channel.send(BackwardDone(done.seconds, transfer.receiving))

    @asynccontextmanager
    async def _reporting_progress(
        self, transfer: ForwardBackwardChannel, channel: Channel
    ) -> AsyncIterator[None]:
        """While a pass computes, begin its time anew whenever the engine gets on, and tell the client."""

        async def watch() -> None:
            seen = self._engine.work
            while True:
                await asyncio.sleep(PROGRESS_INTERVAL)
                if (work := self._engine.work) > seen:
                    seen = work
                    transfer.deadline.computed()
                    await channel.send(PassProgress(work))

        if not transfer.deadline.prolonged:
            yield  # the client gives up by itself, and does not expect to hear of it
            return
        async with running(watch(), "progress of a pass"):
            yield

    @asynccontextmanager
    async def _admitted(
        self, channel: Channel, opening: OpenForward | OpenBackward
    ) -> AsyncIterator[tuple[TrainingRequest, ForwardBackwardChannel]]:
        span = self._check(opening)
        deadline = min(opening.deadline, MAX_DEADLINE)
        late = (
            f"the pass of {sum(opening.lengths)} tokens was not through in {deadline:g} s; "
            f"send smaller batches, or allow it more time"
        )
        sender = self._senders.setdefault(channel.remote, RowSender(asyncio.get_running_loop().time()))
        self.under_way += 1
        try:
            async with deadline_after(deadline, late) as clock:
                with (
                    self._engine.training.admit(channel.remote, span, opening.lengths, deadline) as request,
                    self._resources.reserve(channel.remote, Resource.BYTES, 0) as reserved,
                ):
                    rows = sum(opening.lengths)
                    renewable = RenewableDeadline(request, clock, deadline, MAX_DEADLINE, opening.progress)
                    yield (
                        request,
                        ForwardBackwardChannel(
                            channel, self._engine.executor, rows, sender, reserved, renewable
                        ),
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


def _batch(
    request: TrainingRequest, opening: OpenForward | OpenBackward, inputs: Tensor, adapter: Adapter | None
) -> TrainingBatch:
    return TrainingBatch(
        request.span, request.lengths, inputs, adapter, opening.reproducible, opening.padding
    )
