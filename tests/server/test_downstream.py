"""A server connects for its clients to known peers only, and tells nobody what answers where."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.server.downstream import BURST, StageDialer
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.transport import Stream
from swarmcore.types import Address, PeerId, ServerInfo
from swarmcore.wire.limits import MAX_ADDRESSES
from swarmcore.wire.messages import Hop
from swarmcore.wire.protocols import INFERENCE_PROTOCOL

pytestmark = pytest.mark.virtual_time

CLIENT = Identity.generate().peer


class Watched(MemoryTransport):
    """Writes down what it dials."""

    dialled: list[Address]

    async def open_stream(self, address: Address) -> Stream:
        self.dialled.append(address)
        return await super().open_stream(address)


@attrs.define
class Scene:
    server: Node
    stage: Node
    dialer: StageDialer
    directory: MemoryDirectory
    dialled: list[Address]

    def hop(self, *addresses: str, peer: PeerId | None = None) -> Hop:
        return Hop(peer or self.stage.peer, addresses, "0" * 32, 1, 2)

    async def announce(self) -> None:
        registry = MemoryRegistry(self.stage.peer, self.directory)
        await registry.start()
        await registry.announce(ServerInfo(self.stage.peer, tuple(map(str, self.stage.addresses))), 3600)


async def _join(channel: Channel) -> None:
    await channel.receive()


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    network, directory = MemoryNetwork(), MemoryDirectory()
    own, other = Identity.generate(), Identity.generate()
    transport = Watched(own, network=network, listen_on=["here"])
    transport.dialled = []
    async with Node(own, [transport]) as server, Node(other, [network.transport(other)]) as stage:
        for node in (server, stage):
            node.serve_protocol(INFERENCE_PROTOCOL, _join)
        registry = MemoryRegistry(server.peer, directory)
        await registry.start()
        dialer = StageDialer(server, registry, Counter())
        yield Scene(server, stage, dialer, directory, transport.dialled)
        await registry.close()


async def refusal(scene: Scene, hop: Hop, client: PeerId = CLIENT) -> str:
    with pytest.raises(PeerUnreachableError) as caught:
        await scene.dialer.connect(hop, client)
    assert not caught.value.details
    return caught.value.message


async def test_a_known_stage_is_dialled_where_it_announces_to_be_and_nowhere_else() -> None:
    async with scene() as at:
        await at.announce()
        elsewhere = f"memory:elsewhere/{at.stage.peer}"
        (await at.dialer.connect(at.hop(elsewhere), CLIENT)).abort("seen")
        assert at.dialled == list(at.stage.addresses)


async def test_nobody_is_dialled_who_is_not_known() -> None:
    async with scene() as at:
        stranger = Identity.generate().peer
        await refusal(at, at.hop(f"memory:victim/{stranger}", peer=stranger))
        assert at.dialled == []


async def test_every_failure_reads_the_same() -> None:
    async with scene() as at:
        await at.announce()
        stranger = Identity.generate().peer
        too_many = at.hop(*[f"memory:victim/{at.stage.peer}"] * (MAX_ADDRESSES + 1))
        told = {
            await refusal(at, too_many),
            await refusal(at, at.hop(f"memory:victim/{stranger}", peer=stranger)),
            await refusal(at, at.hop("no address", peer=PeerId("nobody"))),
        }
        await at.stage.close()
        told.add(await refusal(at, at.hop(str(at.stage.addresses[0]))))
        assert told == {"the next stage was not reached"}


async def test_a_stage_that_has_just_joined_is_waited_for() -> None:
    async with scene() as at:
        joining = asyncio.create_task(at.dialer.connect(at.hop(), CLIENT))
        await asyncio.sleep(0.5)
        assert at.dialled == []
        await at.announce()
        (await joining).abort("seen")


async def test_one_client_has_so_many_hops_and_keeps_no_other_from_its_own() -> None:
    async with scene() as at:
        await at.announce()
        for _ in range(int(BURST)):
            (await at.dialer.connect(at.hop(), CLIENT)).abort("seen")
        await refusal(at, at.hop())
        (await at.dialer.connect(at.hop(), Identity.generate().peer)).abort("seen")


async def test_a_server_reaches_itself() -> None:
    async with scene() as at:
        (await at.dialer.connect(at.hop(peer=at.server.peer), CLIENT)).abort("seen")
