from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from swarmcore.identity import Identity
from swarmcore.sim.hosts import Geography
from swarmcore.sim.network import SimNetwork, SimTransport
from swarmcore.testing.transport_contract import TransportContract
from swarmcore.transport import Transport
from swarmcore.wire.limits import Limits


class TestSimulated(TransportContract):
    slack = 2**20

    @pytest.fixture(autouse=True)
    def network(self) -> Iterator[None]:
        self._network = SimNetwork(Geography(floor=0.1, megabits=(10_000.0,)), random.Random(1))
        yield

    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        host = self._network.hosts[int(listen_on[0])] if listen_on else self._network.add_host()
        return self._network.transport(identity, host, limits=limits, listen=bool(listen_on))

    def free_place(self) -> str:
        return str(self._network.add_host().index)

    async def kill(self, transport: Transport) -> None:
        assert isinstance(transport, SimTransport)
        transport.kill()
