"""A block server: holds a span of a model's blocks, announces it, and serves sessions on it."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from types import TracebackType
from typing import Self

import attrs

from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.engine import Engine
from swarmcore.registry.base import Registry
from swarmcore.rpc.method import Caller
from swarmcore.rpc.node import Node
from swarmcore.server.config import ServerConfig
from swarmcore.server.inference import InferenceService
from swarmcore.server.protocols import INFERENCE_PROTOCOL, INFO_METHOD, PING_METHOD
from swarmcore.types import ServerInfo, ServerState, short
from swarmcore.wire.messages import InfoReply, InfoRequest, Ping, Pong

logger = logging.getLogger(__name__)

REFRESH = 5.0
"""Seconds between looks at whether load or cache have changed enough to be announced."""


class BlockServer:
    """Joins an executor, a node and a registry. Use it as an async context manager.

    The node must be listening and the registry started before `start`; both outlive the server, and the
    executor is closed with it.
    """

    def __init__(
        self,
        config: ServerConfig,
        node: Node,
        registry: Registry,
        executor: BlockExecutor,
        *,
        cache_tokens: int,
    ) -> None:
        self.config = config
        self.node = node
        self.registry = registry
        self.executor = executor
        self.engine = Engine(
            executor,
            cache_tokens=cache_tokens,
            max_batch_tokens=config.max_batch_tokens,
            idle_timeout=config.idle_timeout,
        )
        self.inference = InferenceService(
            self.engine,
            executor.model,
            executor.span,
            node,
            admission_timeout=config.admission_timeout,
        )
        self.state: ServerState = "joining"
        self._cache_tokens = cache_tokens
        self._announcer: asyncio.Task[None] | None = None
        self._started_at = 0.0

    @property
    def info(self) -> ServerInfo:
        """What this server announces of itself now."""
        return ServerInfo(
            peer=self.node.peer,
            addresses=tuple(map(str, self.node.addresses)),
            state=self.state,
            model=self.executor.model,
            span=self.executor.span,
            dtype=self.executor.dtype,
            cache_tokens=self._cache_tokens,
            cache_tokens_free=self.engine.cache_tokens_free,
            sessions=self.inference.sessions,
            decode_rps=self.engine.stats.decode_rps,
            forward_rps=self.engine.stats.forward_rps,
            public_name=self.config.public_name,
            version=version("swarmcore"),
        )

    def __repr__(self) -> str:
        model = self.executor.model
        return (
            f"<BlockServer {short(self.node.peer)} {model.name}[{self.executor.span}] {self.state} · "
            f"{self.inference.sessions} sessions · {self.engine.cache_tokens_free} of "
            f"{self._cache_tokens} cache tokens free>"
        )

    async def start(self) -> None:
        """Begin to serve and announce this server as online."""
        self._started_at = asyncio.get_running_loop().time()
        await self.engine.start()
        self.node.serve(PING_METHOD, self._ping)
        self.node.serve(INFO_METHOD, self._info)
        self.node.serve_protocol(INFERENCE_PROTOCOL, self.inference.serve)
        self.state = "online"
        await self.registry.announce(self.info, self.config.announce_ttl)
        self._announcer = asyncio.create_task(self._announce_changes())
        logger.info("%r", self)

    async def close(self) -> None:
        """Withdraw, refuse new sessions, end those that are open. Harmless when repeated."""
        self.inference.draining = True
        self.state = "draining"
        if self._announcer is not None:
            self._announcer.cancel()
            await asyncio.gather(self._announcer, return_exceptions=True)
            self._announcer = None
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

    async def _announce_changes(self) -> None:
        announced = self.info
        while True:
            await asyncio.sleep(REFRESH)
            current = self.info
            if _differs(announced, current):
                try:
                    await self.registry.announce(current, self.config.announce_ttl)
                except Exception:
                    logger.exception("could not announce; trying again in %.0f s", REFRESH)
                else:
                    announced = current

    async def _ping(self, request: Ping, caller: Caller) -> Pong:
        return Pong(request.payload)

    async def _info(self, request: InfoRequest, caller: Caller) -> InfoReply:
        counters = {**self.engine.counters, **self.inference.counters}
        uptime = asyncio.get_running_loop().time() - self._started_at
        return InfoReply(self.info, uptime, {name: float(count) for name, count in counters.items()})


def _differs(announced: ServerInfo, current: ServerInfo) -> bool:
    """Whether clients would choose differently: small moves of load are not worth the traffic."""
    free = abs(announced.cache_tokens_free - current.cache_tokens_free)
    speeds = [(announced.decode_rps, current.decode_rps), (announced.forward_rps, current.forward_rps)]
    steady = attrs.evolve(
        current,
        cache_tokens_free=announced.cache_tokens_free,
        decode_rps=announced.decode_rps,
        forward_rps=announced.forward_rps,
    )
    return (
        steady != announced
        or free > current.cache_tokens // 20
        or any(abs(old - new) > 0.25 * max(old, new) for old, new in speeds)
    )
