"""The server that is fuzzed: real code over a real transport, arithmetic in place of a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs

from swarmcore.identity import Identity
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.resources import Resource
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.transport import transport_class
from swarmcore.types import Address, Span
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD

_CACHE = 4096
_SETTLE_SECONDS = 60.0


class FuzzFailure(Exception):
    """The server did what it may not do, whatever it is sent."""


@attrs.define
class FuzzTarget:
    """The server, and what went wrong in it."""

    server: BlockServer
    faults: list[str]

    @property
    def address(self) -> Address:
        return self.server.node.addresses[0]

    def check(self) -> None:
        """Raise `FuzzFailure` when anything has failed in the server so far."""
        if self.faults:
            raise FuzzFailure(self.faults[0])

    async def check_answers(self) -> None:
        """Raise `FuzzFailure` when an honest peer is not answered."""
        identity = Identity.generate()
        async with Node(identity, [transport_class(self.address.scheme)(identity)]) as honest:
            await honest.call(self.address, PING_METHOD, Ping(b"still there?"), timeout=_SETTLE_SECONDS)

    async def check_settled(self) -> None:
        """Raise `FuzzFailure` when something of the peers that are gone stays behind."""
        left = self._left()
        deadline = asyncio.get_running_loop().time() + _SETTLE_SECONDS
        while left and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
            left = self._left()
        if left:
            raise FuzzFailure(f"left behind: {left}")

    def _left(self) -> dict[str, int]:
        server, resources = self.server, self.server.node.resources
        found = {
            "sessions": server.inference.sessions,
            "cache tokens": server.engine.cache_tokens - server.engine.cache_tokens_free,
            **{kind.value: resources.used(kind) for kind in Resource if kind is not Resource.DESCRIPTORS},
        }
        return {what: count for what, count in found.items() if count}


class _Errors(logging.Handler):
    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self._faults.append(self.format(record))


@asynccontextmanager
async def fuzz_target(scheme: str = "tcp") -> AsyncIterator[FuzzTarget]:
    """A server that listens on this machine over the transport ``scheme``.

    What it logs as an error counts as a fault, and so does what the event loop has to complain about.
    """
    faults: list[str] = []
    handler = _Errors(faults)
    loop = asyncio.get_running_loop()
    logging.getLogger().addHandler(handler)

    def complaint(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        faults.append(f"{context['message']}: {context.get('exception')!r}")

    loop.set_exception_handler(complaint)
    identity = Identity.generate()
    transport = transport_class(scheme)(identity, listen_on=["127.0.0.1:0"])
    config = ServerConfig(model="counting")
    try:
        async with Node(identity, [transport]) as node:
            registry = GossipRegistry(node)
            await registry.start()
            executor = CountingExecutor(Span(0, COUNTING_MODEL.blocks))
            async with BlockServer(config, node, registry, executor, cache_tokens=_CACHE) as server:
                yield FuzzTarget(server, faults)
            await registry.close()
    finally:
        logging.getLogger().removeHandler(handler)
        loop.set_exception_handler(None)
