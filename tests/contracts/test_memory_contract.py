from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from swarmcore.identity import Identity
from swarmcore.testing import Faults, FaultyTransport, MemoryNetwork, MemoryTransport
from swarmcore.testing.transport_contract import TransportContract
from swarmcore.transport import Transport
from swarmcore.wire.limits import Limits

pytestmark = pytest.mark.virtual_time


class TestMemory(TransportContract):
    slack = 2**20

    @pytest.fixture(autouse=True)
    def network(self) -> Iterator[None]:
        self._network = MemoryNetwork()
        self._places = itertools.count(1)
        yield

    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return MemoryTransport(identity, network=self._network, limits=limits, listen_on=listen_on)

    def free_place(self) -> str:
        return str(next(self._places))

    async def kill(self, transport: Transport) -> None:
        assert isinstance(transport, MemoryTransport)
        await transport.crash()


class TestFaultyWithoutFaults(TestMemory):
    faults = Faults()

    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return FaultyTransport(super().make(identity, limits, listen_on), random.Random(1), self.faults)

    async def kill(self, transport: Transport) -> None:
        assert isinstance(transport, FaultyTransport)
        await super().kill(transport.inner)
        await transport.close()


class TestFaultyWithDelay(TestFaultyWithoutFaults):
    faults = Faults(delay=0.001, jitter=0.002)
