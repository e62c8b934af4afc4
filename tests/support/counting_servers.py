"""Servers with the real server code on an in-memory network, and sessions over a chain that tests choose."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import attrs

from swarmcore.client.session.planner import SessionPlanner, random_session_id
from swarmcore.client.session.session import InferenceSession, SessionOptions, open_session
from swarmcore.engine.engine import Engine
from swarmcore.errors import (
    SwarmError,
)
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.routing.chain import Chain, Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.inference import InferenceService
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, hidden_states, read_rows
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import PeerId, ServerInfo, Span
from swarmcore.wire.messages import OpenSession, SessionOpened
from swarmcore.wire.protocols import INFERENCE_PROTOCOL

CACHE = 64


@attrs.define
class Server:
    """A server of the tests: its parts, within reach."""

    node: Node
    executor: CountingExecutor
    engine: Engine
    service: InferenceService

    @property
    def stage(self) -> Stage:
        info = ServerInfo(
            peer=self.node.peer,
            addresses=tuple(map(str, self.node.addresses)),
            model=COUNTING_MODEL,
            span=self.executor.span,
        )
        return Stage(info, self.executor.span)


@asynccontextmanager
async def serving(network: MemoryNetwork, *blocks: str) -> AsyncIterator[list[Server]]:
    async with AsyncExitStack() as stack:
        servers = []
        directory = MemoryDirectory()
        for span in map(Span.parse, blocks):
            identity = Identity.generate()
            node = await stack.enter_async_context(Node(identity, [network.transport(identity)]))
            executor = CountingExecutor(span, tokens=CACHE)
            engine = Engine(executor, cache_tokens=CACHE)
            await engine.start()
            stack.push_async_callback(engine.close)
            registry = MemoryRegistry(node.peer, directory)
            await registry.start()
            stack.push_async_callback(registry.close)
            service = InferenceService(engine, COUNTING_MODEL, span, node, registry, admission_timeout=0.05)
            node.serve_protocol(INFERENCE_PROTOCOL, service.serve)
            servers.append(server := Server(node, executor, engine, service))
            await registry.announce(server.stage.server, 3600)
        yield servers


class PlannedBy(SessionPlanner):
    """A planner that asks a function for the chain around the peers to be avoided."""

    def __init__(self, chain: Callable[[frozenset[PeerId]], Chain]) -> None:
        self.chain = chain
        self.adapter = None
        self.session_id = random_session_id

    def plan(self, span: Span, *, blocked=frozenset(), **_) -> Chain:
        return self.chain(blocked)

    def compare(self, chain: Chain, **_) -> None:
        return None

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        pass

    def worked(self, peer: PeerId) -> None:
        pass


async def session_over(
    client: Node,
    servers: Sequence[Server],
    *,
    stages: Sequence[Stage] | None = None,
    sequences: int = 1,
    **options,
) -> InferenceSession:
    chain = Chain(tuple(stages or [server.stage for server in servers]))
    return await open_session(
        client,
        PlannedBy(lambda blocked: chain),
        COUNTING_MODEL,
        sequences=sequences,
        options=SessionOptions(open_timeout=5, step_timeout=5, **{"journal": "off", **options}),
    )


def rows(count: int, seed: int = 1) -> list[list[float]]:
    return [
        [(seed + 3 * i + 7 * j) % 11 / 8 for j in range(COUNTING_MODEL.hidden_size)] for i in range(count)
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def whole_model(*sequences: list[list[float]]) -> list[list[list[float]]]:
    """What every row of each sequence comes out as when one executor runs it all at once."""
    executor = CountingExecutor()
    outputs = []
    for number, given in enumerate(sequences):
        sequence = SequenceId(number)
        executor.reserve(sequence, 4 * CACHE)
        [output] = await executor.step(
            [ScheduledChunk(hidden_states(given), 0, executor.span, (Segment(sequence, 0, len(given)),))]
        )
        outputs.append(read_rows(output))
    return outputs


async def open_by_hand(client: Node, server: Server, **changes) -> tuple[Channel, OpenSession]:
    span = server.executor.span
    opening = attrs.evolve(
        OpenSession(secrets.token_hex(16), COUNTING_MODEL.fingerprint, span.start, span.end, 1), **changes
    )
    channel = await client.open(server.node.addresses, INFERENCE_PROTOCOL, opening)
    message = await channel.receive()
    assert isinstance(message.record, SessionOpened)
    return channel, opening
