"""A training run in memory: real members, exact vectors, links and registry at the test's command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from types import TracebackType
from typing import Any

import attrs
import torch

from swarmcore.identity import Identity
from swarmcore.registry.base import Registry
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.training.local_steps.member import RunMember
from swarmcore.training.local_steps.replica import Replica, State
from swarmcore.training.local_steps.settings import LocalStepsSettings, RoundReport
from swarmcore.types import PeerId

LINK = Faults(delay=0.01)
DEADLINE = 5.0


@attrs.define(eq=False)
class Trainee:
    """A member and the parameters that it trains."""

    member: RunMember
    transport: FaultyTransport
    registry: MemoryRegistry
    parameters: torch.Tensor
    reports: list[RoundReport] = attrs.field(factory=list)

    @property
    def peer(self) -> PeerId:
        return self.member.node.peer

    @property
    def state(self) -> str:
        return self.member.replica.lineage.state

    async def exchange(self, delta: torch.Tensor | None = None, samples: int = 1) -> RoundReport:
        """Deliver ``delta``, or what the parameters have changed by, and go on from what is current."""
        if delta is None:
            delta = self.member.replica.state.parameters - self.parameters
        report = await self.member.exchange(delta, samples)
        state = self.member.replica.state
        self.parameters = state.parameters.clone()
        if self.member.arrived(state):
            self.member.outgoing = None
        self.reports.append(report)
        return report


class TrainingRun:
    """Members of one run, who see each other in one directory at once. A killed one is seen for a while."""

    def __init__(self, *, seen_dead: float = 3.0, **settings: Any) -> None:
        self.network = MemoryNetwork()
        self.directory = MemoryDirectory()
        self.trainees: list[Trainee] = []
        self.seen_dead = seen_dead
        self.settings = LocalStepsSettings(**{"run": "test", "deadline": DEADLINE, **settings})
        self._random = Random(1)
        self._nodes: list[Node] = []

    async def __aenter__(self) -> TrainingRun:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for trainee in self.trainees:
            await trainee.member.leave()
        for node in self._nodes:
            await node.close()

    def node(self, *, listen: bool = True) -> tuple[Node, FaultyTransport]:
        """A node that takes no part yet."""
        identity = Identity.from_seed(self._random.randbytes(32))
        transport = FaultyTransport(self.network.transport(identity, listen=listen), self._random, LINK)
        node = Node(identity, [transport])
        self._nodes.append(node)
        return node, transport

    async def member(
        self, parameters: torch.Tensor, directory: MemoryDirectory | None = None, **settings: Any
    ) -> Trainee:
        """A member that has not joined yet."""
        node, transport = self.node()
        await node.start()
        registry = MemoryRegistry(node.peer, directory or self.directory)
        await registry.start()
        own = attrs.evolve(self.settings, **settings)
        terms = own.terms(len(parameters), "")
        replica = Replica(terms, State.first(terms, parameters.clone()))
        member = RunMember(node, registry, own, replica, rng=Random(self._random.random()))
        return Trainee(member, transport, registry, parameters.clone())

    async def join(
        self, parameters: torch.Tensor, directory: MemoryDirectory | None = None, **settings: Any
    ) -> Trainee:
        trainee = await self.member(parameters, directory, **settings)
        await trainee.member.join()
        trainee.parameters = trainee.member.replica.state.parameters.clone()
        self.trainees.append(trainee)
        return trainee

    async def joined(self, count: int, values: int = 4) -> list[Trainee]:
        """So many who begin together, in the order of their peer ids."""
        return [await self.join(torch.zeros(values)) for _ in range(count)]

    async def kill(self, trainee: Trainee) -> None:
        """As with SIGKILL: all its connections break; the registry notices after a while."""
        self.trainees.remove(trainee)
        inner = trainee.transport.inner
        assert isinstance(inner, MemoryTransport)
        await inner.crash()
        trainee.transport.break_connections()
        loop = asyncio.get_running_loop()
        loop.call_later(self.seen_dead, lambda: self.directory._set(trainee.peer, None))

    def coordinator(self, round_number: int) -> Trainee:
        """Who is first to coordinate a round."""
        from swarmcore.training.local_steps.replica import by_rank

        first = by_rank(self.settings.run, round_number, [t.peer for t in self.trainees])[0]
        return next(trainee for trainee in self.trainees if trainee.peer == first)

    def assert_same(self, trainees: Sequence[Trainee] | None = None) -> None:
        """All have the same state, bit for bit."""
        first, *others = trainees if trainees is not None else self.trainees
        for other in others:
            assert other.member.replica.lineage == first.member.replica.lineage
            assert torch.equal(other.member.replica.state.parameters, first.member.replica.state.parameters)
            assert torch.equal(other.member.replica.state.velocity, first.member.replica.state.velocity)


class MemoryPlaces:
    """One network in memory, on which `LocalSteps` open their nodes."""

    def __init__(self) -> None:
        self.directory = MemoryDirectory()
        self._network = MemoryNetwork()
        self._random = Random(3)

    @asynccontextmanager
    async def open(self, seed: int | None = None, delay: float = 0.0) -> AsyncIterator[tuple[Node, Registry]]:
        """A node with the identity of that seed, or a new one, whose messages take ``delay`` seconds."""
        secret = self._random.randbytes(32) if seed is None else bytes([seed]) * 32
        identity = Identity.from_seed(secret)
        registry = MemoryRegistry(identity.peer, self.directory)
        inner = self._network.transport(identity)
        transport = FaultyTransport(inner, self._random, Faults(delay=delay))
        async with Node(identity, [transport]) as node:
            yield node, registry
            await registry.close()


async def exchange_all(trainees: Sequence[Trainee], delta: float | None = None) -> None:
    values = trainees[0].member.replica.terms.values
    given = None if delta is None else torch.full((values,), delta)
    await asyncio.gather(*(trainee.exchange(given) for trainee in trainees))
