"""Generation servers on a network in memory, with a text model that counts, and a client without torch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs

from swarmcore.client.generation.stream import GeneratedText, TextStream
from swarmcore.client.swarm import Swarm
from swarmcore.errors import InputError
from swarmcore.head.queue import GenerationLimits
from swarmcore.head.service import GenerationService
from swarmcore.identity import Identity
from swarmcore.prompts import EncodedPrompt
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.types import ModelInfo, Numerics, ServerInfo
from swarmcore.wire.protocols import GENERATE_PROTOCOL

COUNTING = ModelInfo("counting", "c0" * 32, 4, 8)
END = 250


def counted(prompt: str, count: int, seed: int = 0) -> list[int]:
    """The tokens that follow a prompt."""
    first = sum(prompt.encode()) + seed
    return [(first + 7 * place) % END for place in range(count)]


def said(tokens: Sequence[int]) -> str:
    return "".join(f"{token} " for token in tokens)


class CountedText(TextStream):
    """A text in the making."""

    def __init__(self, model: CountingText, first: int, so_far: Sequence[int], count: int) -> None:
        text = GeneratedText(tokens=list(so_far), numerics=model.numerics)
        super().__init__(text, self._make(text, model, first, count))

    @property
    def _made_by(self) -> str:
        return "counting"

    @staticmethod
    async def _make(
        text: GeneratedText, model: CountingText, first: int, count: int
    ) -> AsyncGenerator[tuple[int, str], None]:
        model.under_way += 1
        model.most_under_way = max(model.most_under_way, model.under_way)
        try:
            while len(text.tokens) < count:
                await asyncio.sleep(model.seconds)
                if model.error is not None and len(text.tokens) >= model.error_after:
                    raise model.error
                text.tokens.append((first + 7 * len(text.tokens)) % END)
                model.made += 1
                if len(text.tokens) % model.silent == 0:
                    yield 0, said(text.tokens[-model.silent :])
            text.finish_reason = "length"
        finally:
            model.under_way -= 1


@attrs.define(eq=False)
class CountingText:
    """A `TextModel` without torch. Each token takes ``seconds``, and each ``silent`` of them make a piece."""

    info: ModelInfo = COUNTING
    seconds: float = 0.1
    silent: int = 1
    error: Exception | None = None
    error_after: int = 0
    numerics: tuple[Numerics, ...] = ()
    made: int = 0
    under_way: int = 0
    most_under_way: int = 0
    namespaces: list[str] = attrs.field(factory=list)
    """Of the texts, in their order."""

    async def encode(self, prompt: Any) -> EncodedPrompt:
        if not isinstance(prompt, str):
            raise InputError("only texts can be counted on")
        return EncodedPrompt(list(prompt.encode()), [])

    def generate(
        self,
        prompt: EncodedPrompt,
        *,
        adapter: str | None = None,
        so_far: Sequence[int] = (),
        namespace: str = "",
        **options: Any,
    ) -> CountedText:
        self.namespaces.append(namespace)
        first = sum(prompt.tokens) + (options["seed"] or 0)
        return CountedText(self, first, so_far, options["max_new_tokens"] or 256)


@attrs.define(eq=False)
class GenerationServer:
    node: Node
    transport: MemoryTransport
    registry: MemoryRegistry
    model: CountingText
    service: GenerationService

    async def announce(self, **changes: Any) -> None:
        info = ServerInfo(self.node.peer, tuple(map(str, self.node.addresses)), heads=(self.model.info,))
        await self.registry.announce(attrs.evolve(info, **changes), 3600)

    async def kill(self) -> None:
        """Vanish, as by SIGKILL; nobody withdraws anything."""
        await self.transport.crash()


@attrs.define(eq=False)
class HeadSwarm:
    network: MemoryNetwork
    directory: MemoryDirectory
    random: random.Random
    client: Swarm
    heads: list[GenerationServer] = attrs.field(factory=list)
    others: list[Swarm] = attrs.field(factory=list)

    async def add(
        self, model: CountingText | None = None, limits: GenerationLimits | None = None
    ) -> GenerationServer:
        identity = Identity.from_seed(self.random.randbytes(32))
        transport = self.network.transport(identity)
        node = Node(identity, [transport])
        await node.start()
        service = GenerationService(model or CountingText(), limits)
        node.serve_protocol(GENERATE_PROTOCOL, service.serve)
        registry = MemoryRegistry(node.peer, self.directory)
        head = GenerationServer(node, transport, registry, service.model, service)  # type: ignore[arg-type]
        await registry.start()
        await head.announce()
        self.heads.append(head)
        return head

    async def another_client(self) -> Swarm:
        swarm = await _client(self.network, self.directory, self.random).__aenter__()
        self.others.append(swarm)
        return swarm


def _client(network: MemoryNetwork, directory: MemoryDirectory, rng: random.Random) -> Swarm:
    identity = Identity.from_seed(rng.randbytes(32))
    node = Node(identity, [network.transport(identity, listen=False)])
    return Swarm(node, MemoryRegistry(node.peer, directory), rng=rng)


@asynccontextmanager
async def head_swarm(*models: Any, limits: GenerationLimits | None = None) -> AsyncIterator[HeadSwarm]:
    """Generation servers of these models, and a client; at the end no text is under way."""
    network, directory, rng = MemoryNetwork(), MemoryDirectory(), random.Random(5)
    async with _client(network, directory, rng) as client:
        swarm = HeadSwarm(network, directory, rng, client)
        try:
            for model in models:
                await swarm.add(model, limits)
            yield swarm
        finally:
            for other in swarm.others:
                await other.close()
            for head in swarm.heads:
                await head.service.close()
                await head.registry.close()
                await head.node.close()
    assert not any(head.service.queue.under_way for head in swarm.heads)
