"""A block server: holds a span of a model's blocks, announces it, and serves sessions on it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeGuard

import attrs

from swarmcore.distribution import version
from swarmcore.engine.engine import Engine
from swarmcore.errors import AdapterError, InputError, SwarmError
from swarmcore.executor.base import BlockExecutor
from swarmcore.placement.rebalance import MoveCost
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import answer_ping
from swarmcore.server.adapters import AdapterStore, Weights
from swarmcore.server.announcer import Announcer
from swarmcore.server.config import ServerConfig
from swarmcore.server.forward_backward import ForwardBackwardService, training_limits
from swarmcore.server.inference import InferenceService
from swarmcore.server.rebalancing import Rebalancing
from swarmcore.server.successor_rtts import SuccessorRtts
from swarmcore.server.throughput import ServerSpeed
from swarmcore.sources import announced_source
from swarmcore.tasks import cancel_and_wait, loop_time
from swarmcore.types import ADAPTERS, TRAINING, ModelInfo, PeerId, ServerInfo, ServerState, Span, short
from swarmcore.wire.messages import InfoReply, InfoRequest
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import (
    BACKWARD_OF_PADDING_PROTOCOL,
    BACKWARD_PROTOCOL,
    FORWARD_OF_PADDING_PROTOCOL,
    FORWARD_PROTOCOL,
    INFERENCE_PROTOCOL,
    INFO_METHOD,
    PING_METHOD,
    SESSION_STATE_METHOD,
)

logger = logging.getLogger(__name__)

VERSION = version()


class AnnouncedService(Protocol):
    """A service beside the blocks that is announced with them: the generation server of `swarmcore.head`."""

    counters: Counter[str]

    @property
    def announced(self) -> ModelInfo: ...

    @property
    def note(self) -> str: ...

    async def leave(self, view: SwarmView, own: PeerId, seconds: float) -> None: ...


class BlockServer:
    """Joins an executor, a node and a registry. Use it as an async context manager.

    The node must be listening and the registry started before `start`; both outlive the server, and the
    executor is closed with it. ``speed`` is what was measured of it before, ``seconds_per_block`` how long it
    took to load a block, ``read_adapter`` reads the weights of some blocks from an adapter's folder. With an
    ``rng`` it measures round trips to servers that may follow it, and moves to other blocks, looking as often
    as `ServerConfig.rebalance_interval` says; without one it does neither. ``incarnation`` is to differ from
    one start to the next. A ``service`` that runs already is announced with the blocks, and leaves with them.
    Spans of the model begin at multiples of ``start_step`` blocks.
    """

    def __init__(
        self,
        config: ServerConfig,
        node: Node,
        registry: Registry,
        executor: BlockExecutor,
        *,
        cache_tokens: int,
        speed: ServerSpeed | None = None,
        seconds_per_block: float = 1.0,
        read_adapter: Callable[[str, Span], Awaitable[Weights]] | None = None,
        rng: random.Random | None = None,
        incarnation: int = 0,
        service: AnnouncedService | None = None,
        start_step: int = 1,
    ) -> None:
        self.config = config
        self.node = node
        self.registry = registry
        self.executor = executor
        self.speed = speed or ServerSpeed(stated=config.throughput if _is_number(config.throughput) else 0.0)
        self.incarnation = incarnation
        self.service = service
        """What makes texts here for clients that have no part of the model."""
        self.engine = Engine(
            executor,
            cache_tokens=cache_tokens,
            max_batch_tokens=config.max_batch_tokens,
            idle_timeout=config.idle_timeout,
            training_limits=training_limits(config),
        )
        self.adapters = AdapterStore(executor, config.adapter_budget, node.resources)
        self.inference = InferenceService(
            self.engine,
            executor.model,
            executor.span,
            node,
            registry,
            admission_timeout=config.admission_timeout,
            adapters=self.adapters,
            share_prefixes=config.share_prefixes,
        )
        self.training = ForwardBackwardService(
            self.engine, executor.model, executor.span, self.adapters, node.resources
        )
        self._model = attrs.evolve(executor.model, source=announced_source(config.model, config.revision))
        self.state: ServerState = "joining"
        self.span = executor.span
        """Blocks that sessions may be opened on; while nothing can be served, those that are loaded."""
        self.target: Span | None = None
        """Blocks that it is about to move to."""
        self.moves = 0
        """How often it has moved to other blocks."""
        self._seconds_per_block = seconds_per_block
        self._start_step = start_step
        self._read_adapter = read_adapter
        self._announcer = Announcer(node, registry, lambda: self.info, config.announce_ttl)
        self._tasks: list[asyncio.Task[None]] = []
        self._rebalancing: Rebalancing | None = None
        self._successor_rtts: SuccessorRtts | None = None
        if rng is not None:
            self._successor_rtts = SuccessorRtts(
                node, registry.view, executor.model, lambda: self.span, rng=rng
            )
            if config.rebalance_interval > 0:
                self._rebalancing = Rebalancing(
                    self, node.peer, config.rebalance_interval, rng, balance_quality=config.balance_quality
                )
        self._moving = False
        self._started = False
        self._started_at = 0.0

    @property
    def info(self) -> ServerInfo:
        """What this server announces of itself now."""
        blocks = len(self.executor.span)
        stats = self.engine.stats
        return ServerInfo(
            peer=self.node.peer,
            addresses=tuple(map(str, self.node.addresses)),
            state=self.state,
            model=self._model,
            span=self.span,
            dtype=self.executor.dtype,
            cache_tokens=self.engine.cache_tokens,
            cache_tokens_free=self.engine.cache_tokens_free,
            sessions=self.inference.sessions,
            decode_rps=stats.decode_rps or self.speed.compute.decode_rps / blocks,
            forward_rps=stats.forward_rps or self.speed.compute.forward_rps / blocks,
            throughput=self.speed.throughput(len(self.target or self.span)),
            queue_seconds=self.engine.queue_seconds,
            rtts=self._successor_rtts.rtts if self._successor_rtts is not None else (),
            target=self.target,
            pinned=self._rebalancing is None,
            pass_tokens=self.config.max_pass_tokens if TRAINING in self.executor.capabilities else 0,
            adapters=self.adapters.names,
            heads=(self.service.announced,) if self.service is not None else (),
            incarnation=self.incarnation,
            public_name=self.config.public_name,
            version=VERSION,
            numerics=str(self.executor.numerics),
            capabilities=tuple(sorted(self.executor.capabilities)),
            start_step=self._start_step,
        )

    @property
    def move_cost(self) -> MoveCost:
        """What it would give up now by a move."""
        return MoveCost(self._seconds_per_block, self.engine.cache_tokens_used)

    @property
    def notes(self) -> tuple[str, ...]:
        """What it is about to do and why, and how it is reached where that could be better, in words."""
        if self.state == "draining":
            return ("leaving: it takes no new sessions",)
        notes = list(self.registry.notes)
        if self._rebalancing is not None:
            notes.append(self._rebalancing.note)
        else:
            notes.append("placement: it stays on its blocks, as it was told")
        if lacking := sorted({TRAINING, ADAPTERS} - self.executor.capabilities):
            notes.append(f"its executor ({self.executor.numerics}) has no {' and no '.join(lacking)}")
        if self.adapters.names:
            notes.append(f"adapters: {', '.join(self.adapters.names)}")
        if self.service is not None:
            notes.append(self.service.note)
        used, pages = self.engine.cache_pages
        if used:
            notes.append(f"attention cache: {used} of {pages} pages are in use, {pages - used} are free")
        if self.engine.prefixes.hits or len(self.engine.prefixes):
            notes.append(f"prefix cache: {self.engine.prefixes}")
        if drafts := self.inference.drafts:
            notes.append(f"drafts: {drafts}")
        return (*notes, *self.node.notes)

    def __repr__(self) -> str:
        model = self.executor.model
        moving = f" moving to {self.target}" if self.target else ""
        return (
            f"<BlockServer {short(self.node.peer)} {model.name}[{self.span}] {self.state}{moving} · "
            f"{self.inference.sessions} sessions · {self.engine.cache_tokens_free} of "
            f"{self.engine.cache_tokens} cache tokens free>"
        )

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the adapters, begin to serve and announce this server as online.

        Raise `AdapterError` for an adapter that cannot be served.
        """
        self._started_at = asyncio.get_running_loop().time()
        await self._load_adapters()
        await self.engine.start()
        self.node.serve(PING_METHOD, answer_ping)
        self.node.serve(SESSION_STATE_METHOD, self.inference.state)
        self.node.serve(INFO_METHOD, self._info)
        self.node.serve_protocol(INFERENCE_PROTOCOL, self.inference.serve)
        self.node.serve_protocol(FORWARD_PROTOCOL, self.training.forward)
        self.node.serve_protocol(BACKWARD_PROTOCOL, self.training.backward)
        self.node.serve_protocol(FORWARD_OF_PADDING_PROTOCOL, self.training.forward)
        self.node.serve_protocol(BACKWARD_OF_PADDING_PROTOCOL, self.training.backward)
        self.state = "online"
        self._started = True
        await self._announcer.announce()
        self._tasks.append(asyncio.create_task(self._announcer.run(), name="announcing"))
        if self._successor_rtts is not None:
            self._successor_rtts.start()
        if self._rebalancing is not None:
            self._tasks.append(asyncio.create_task(self._rebalancing.run(), name="rebalancing"))
        logger.info("%r", self)

    async def _load_adapters(self) -> None:
        for name, folder in self.config.adapters.items():
            if self._read_adapter is None:
                raise AdapterError(f"adapter {name!r} cannot be served: nothing reads adapters here")
            await self.adapters.load_named(name, partial(self._read_adapter, folder))

    async def leave(self) -> int:
        """Say that this server leaves, refuse new sessions, and let those that are open move elsewhere.

        Wait for them, and for forward and backward passes under way, up to `ServerConfig.drain` seconds;
        return how many sessions are still open then. `close` comes after it.
        """
        await self._stop_tasks()
        self.state, self.target = "draining", None
        await self._announcer.try_to_announce()
        logger.info("%r", self)
        if self.service is None:
            return await self._drain(None)
        texts = self.service.leave(self.registry.view(), self.node.peer, self.config.drain)
        open_sessions, _ = await asyncio.gather(self._drain(None), texts)
        return open_sessions

    async def close(self) -> None:
        """Withdraw, refuse new sessions, end those that are open. Harmless when repeated."""
        self.inference.keep_only(None)
        self.training.keep_only(None)
        self.state = "draining"
        await self._stop_tasks()
        if self._started:
            self._started = False
            await self.registry.withdraw()
        await self.engine.close()
        await self.executor.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # --- moving ------------------------------------------------------------------------------------------

    async def announce_target(self, target: Span | None) -> None:
        """Let others know where this server is about to move, or that it will stay after all."""
        self.target = target
        await self._announcer.try_to_announce()

    async def move_to(self, span: Span) -> None:
        """Hold the blocks ``span`` instead of those held now; blocks that stay are served all the while.

        Sessions on blocks that leave get up to `ServerConfig.drain` seconds to go elsewhere and are ended
        then. When loading fails the server takes back what it had, as far as it can, and raises what loading
        raised. Raise `InputError` while another move is under way.
        """
        held = self.executor.span
        if span == held:
            await self.announce_target(None)
            return
        if self._moving:
            raise InputError(f"{self!r} is moving already")
        self._moving = True
        kept = held.overlap(span)
        try:
            self.state, self.span, self.target = ("online", kept, span) if kept else ("joining", span, None)
            await self._announcer.try_to_announce()
            await self._drain(kept)
            await asyncio.gather(self.inference.end(keep=kept), self.training.end(keep=kept))
            await self._load(span, instead_of=held)
        finally:
            self._moving = False

    async def _drain(self, keep: Span | None) -> int:
        """Let what needs blocks outside of ``keep`` come to its end; return how many sessions have not."""
        open_sessions, _ = await asyncio.gather(
            self.inference.drain(self.config.drain, keep=keep),
            self.training.drain(self.config.drain, keep=keep),
        )
        return open_sessions

    async def _load(self, span: Span, *, instead_of: Span) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        try:
            self.engine.forget_prefixes(span.overlap(instead_of) or span)
            await self.executor.change_span(span)
        except SwarmError as exc:
            logger.error("could not load blocks %s, going back to %s: %s", span, instead_of, exc)
            await self._go_back(instead_of)
            raise
        self.moves += 1
        fresh = sum(block not in instead_of for block in span)
        self._seconds_per_block = (loop.time() - before) / max(1, fresh)
        await self._serve_again()

    async def _go_back(self, held: Span) -> None:
        """After a failed move: hold what was held before, or else what is left of it."""
        try:
            await self.executor.change_span(held)
        except SwarmError as exc:
            if self.state == "joining":  # nothing stayed
                logger.error("could not load blocks %s again, leaving the swarm: %s", held, exc)
                self.state = "draining"
                await self._announcer.try_to_announce()
                return
            logger.error("could not load blocks %s again, staying on %s: %s", held, self.executor.span, exc)
        await self._serve_again()

    async def _serve_again(self) -> None:
        await self.adapters.change_span()
        self.span = self.executor.span
        self.inference.resume(self.span)
        self.training.resume(self.span)
        self.state, self.target = "online", None
        await self._announcer.try_to_announce()
        logger.info("%r", self)

    async def _stop_tasks(self) -> None:
        await cancel_and_wait(*self._tasks)
        self._tasks.clear()
        if self._successor_rtts is not None:
            await self._successor_rtts.close()

    async def _info(self, request: InfoRequest, caller: Caller) -> InfoReply:
        services = self.inference.counters + self.training.counters + self.adapters.counters
        if self.service is not None:
            services += self.service.counters
        counted = {**self.engine.counters, **services, "moves": self.moves}
        counted["processor_seconds"] = time.process_time()
        counters = {name: float(count) for name, count in counted.items()} | self.node.measures
        now = loop_time()
        notes = (*self.notes, *filter(None, [self.engine.stats.recent(now)]))
        return InfoReply(self.info, now - self._started_at, counters, notes, self.node.resources.snapshot())


def _is_number(throughput: float | str) -> TypeGuard[float]:
    return not isinstance(throughput, str)
