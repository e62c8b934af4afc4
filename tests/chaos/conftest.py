"""Real servers of the real small model in float32, three stages of ten blocks, two replicas of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_asyncio
import torch
from byte_tokenizer import byte_tokenizer
from census import Census
from plain_reference import PlainReference
from tiny_models import save_random_model, tiny_config

import swarmcore
from swarmcore.testing.fleet import Fleet, Member
from swarmcore.testing.fork_server import ForkServer
from swarmcore.types import Span

STAGES = (Span(0, 10), Span(10, 20), Span(20, 30))
ARGUMENTS = ("--dtype", "float32", "--threads", "1", "--cache-tokens", "4096")
REPLICAS = 2


@attrs.define
class Client:
    """A model over the fleet, and the failovers of its sessions."""

    fleet: Fleet
    swarm: swarmcore.Swarm
    model: swarmcore.RemoteModel
    failovers: list[Any]

    async def replicas(self) -> None:
        """Wait until every server that lives, or is being started, is known here."""
        await self.fleet.settle()
        await self.fleet.seen_by(self.swarm)

    async def replicas_of(self, stage: int) -> None:
        """As `replicas`, for one stage only."""
        await self.fleet.settle(self.fleet.spans[stage])
        await self.fleet.seen_by(self.swarm, self.fleet.spans[stage])

    def serving(self, session: swarmcore.ModelSession, stage: int) -> Member:
        """The server of the session's chain that runs the first of the stage's blocks.

        Routing may split the rest of them off, to another server.
        """
        start = self.fleet.spans[stage].start
        (peer,) = (s.server.peer for s in session.chain.stages if s.span.start == start)
        return self.fleet.members[peer]


@attrs.frozen
class Talkative:
    """A tiny model that neither ends nor repeats itself, for which a prompt has no spaces."""

    folder: Path
    spans: tuple[Span, ...]
    reference: PlainReference


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Talkative:
    folder, tokenizer = tmp_path_factory.mktemp("talkative"), byte_tokenizer()
    config = tiny_config("llama")
    # The first 94 tokens of the byte tokenizer are one printable character each.
    config.vocab_size, config.eos_token_id = 94, None
    model = save_random_model(config, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Talkative(folder, (Span(0, 2), Span(2, 4), Span(4, 5)), PlainReference(model, tokenizer))


StartFleet = Callable[..., Fleet]


@pytest.fixture(scope="session")
def make_fleet(fork_server: ForkServer, smollm2_folder: Path) -> StartFleet:
    """``make_fleet(**options)`` is a `Fleet` of the three stages, not entered yet."""

    def make(
        fork_server: ForkServer = fork_server,
        model: Path = smollm2_folder,
        spans: Sequence[Span] = STAGES,
        **options: Any,
    ) -> Fleet:
        return Fleet(fork_server, str(model), spans, arguments=ARGUMENTS, **options)

    return make


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_fleet(make_fleet: StartFleet) -> AsyncIterator[Fleet]:
    async with make_fleet(replicas=REPLICAS) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(shared_fleet: Fleet) -> AsyncIterator[Fleet]:
    """Six servers, two for each stage. When the test is over nothing of it is left on any of them."""
    await make_whole(shared_fleet)
    before = await Census.of(shared_fleet)
    yield shared_fleet
    await make_whole(shared_fleet)
    await before.comes_back(shared_fleet)


async def make_whole(fleet: Fleet) -> None:
    """Start what is missing, stop what is too many."""
    await fleet.settle()
    for span in fleet.spans:
        holding = fleet.holding(span)
        for member in holding[fleet.replicas :]:
            fleet.leave(member.peer)
        for _ in range(fleet.replicas - len(holding)):
            fleet.start_soon(span)
    await fleet.settle()


@pytest.fixture(params=["client"])
def journal(request: pytest.FixtureRequest) -> str:
    """Who keeps the journal; another mode is a parameter of the test."""
    mode: str = request.param
    return mode


OpenClient = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(scope="session")
def open_client() -> OpenClient:
    """``async with open_client(fleet, **session_options) as client``: with a connection of its own.

    Its sessions change servers when one fails or leaves, and never because another looks faster.
    """

    @asynccontextmanager
    async def open_one(fleet: Fleet, **options: Any) -> AsyncIterator[Client]:
        failovers: list[Any] = []
        settings = swarmcore.SessionOptions(on_failover=failovers.append, moves=None, **options)
        async with swarmcore.connect(*fleet.addresses) as swarm:
            model = await swarm.load_model(fleet.model, dtype="float32", threads=1, session_options=settings)
            client = Client(fleet, swarm, model, failovers)
            await client.replicas()
            yield client

    return open_one


@pytest_asyncio.fixture(loop_scope="session")
async def client(fleet: Fleet, open_client: OpenClient, journal: str) -> AsyncIterator[Client]:
    """A client of the fleet."""
    async with open_client(fleet, journal=journal) as client:
        yield client
