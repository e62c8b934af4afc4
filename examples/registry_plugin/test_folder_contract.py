"""swarmcore's contract for registries, on this plugin as it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from swarmcore_folder import FolderRegistry

import swarmcore
from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig
from swarmcore.serving import run_bootstrap
from swarmcore.testing.registry_contract import Member, RegistryContract, RegistrySwarm
from swarmcore.types import ServerInfo


class FolderSwarm(RegistrySwarm):
    ttl, patience = 1.5, 20.0  # in real time

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members: list[Member] = []

    async def join(self, identity: Identity | None = None) -> Member:
        identity = identity or Identity.generate()
        member = Member(identity, FolderRegistry(identity, self.folder, interval=0.05))
        await member.registry.start()
        self.members.append(member)
        return member

    async def crash(self, member: Member) -> None:
        await member.registry.close()

    async def aclose(self) -> None:
        for member in self.members:
            await member.registry.close()


class TestFolderRegistry(RegistryContract):
    @pytest.fixture
    async def swarm(self, tmp_path: Path) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(FolderSwarm(tmp_path / "swarm")) as swarm:
            yield swarm


async def test_peers_choose_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NetworkConfig(transports={"tcp": ["127.0.0.1:0"]}, registry="folder")
    with pytest.raises(InputError, match="SWARMCORE_FOLDER"):
        await run_bootstrap(network, Identity.generate())
    monkeypatch.setenv("SWARMCORE_FOLDER", str(tmp_path))
    online: asyncio.Future[ServerInfo] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_bootstrap(network, Identity.generate(), on_online=online.set_result))
    try:
        info = await asyncio.wait_for(online, 10)
        async with swarmcore.connect(*info.addresses, registry="folder") as swarm:
            assert set(swarm.view().servers) == {info.peer}
            assert (await swarm.info(info.peer)).server == info
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_others_cannot_put_words_into_a_peers_mouth(tmp_path: Path) -> None:
    async with aclosing(FolderSwarm(tmp_path)) as swarm:
        one = await swarm.join()
        await one.registry.announce(one.info(), swarm.ttl)
        record = (tmp_path / one.identity.peer).read_bytes()
        (tmp_path / "forged").write_bytes(record[:-1] + bytes([record[-1] ^ 1]))
        (tmp_path / "nonsense").write_bytes(b"nonsense")
        (tmp_path / "large").write_bytes(bytes(100_000))
        other = await swarm.join()
        assert other.knows(one.info())
