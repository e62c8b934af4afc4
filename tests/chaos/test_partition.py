"""Servers in a network of their own, whose cable is pulled: no packet arrives, and nobody is told."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator

import attrs
import pytest
import pytest_asyncio
from census import LEAK_TIMEOUT, Census

import swarmcore
from swarmcore.testing.fork_server import ForkServer
from swarmcore.types import Span

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "No man is an island, entire of itself;"
TOKENS = 12

MAINLAND = f"10.231.{os.getpid() % 250}.1"
SHORE = f"10.231.{os.getpid() % 250}.2"


@attrs.frozen
class Island:
    """A network namespace at one end of a cable; at the other end is a bridge with an address of ours."""

    name: str
    fork_server: ForkServer

    def cut(self) -> None:
        ip(f"link set {self.name}-c nomaster")

    def join(self) -> None:
        ip(f"link set {self.name}-c master {self.name}-b")


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("needs root, and ip of iproute2, for a network namespace")
    name = f"sc{os.getpid()}"
    try:
        ip(f"netns add {name}")
        ip(f"link add {name}-c type veth peer name eth0 netns {name}")
        ip(f"link add {name}-b type bridge")
        ip(f"link set {name}-c master {name}-b")
        ip(f"addr add {MAINLAND}/24 dev {name}-b")
        ip(f"-n {name} addr add {SHORE}/24 dev eth0")
        for device in (f"{name}-b", f"{name}-c"):
            ip(f"link set {device} up")
        for device in ("eth0", "lo"):
            ip(f"-n {name} link set {device} up")
        yield name
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"cannot make a network namespace here: {exc.stderr.decode().strip()}")
    finally:
        for command in (f"link del {name}-c", f"link del {name}-b", f"netns del {name}"):
            subprocess.run(["ip", *command.split()], capture_output=True)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def island(namespace: str) -> AsyncIterator[Island]:
    async with ForkServer(prefix=("ip", "netns", "exec", namespace)) as fork_server:
        yield Island(namespace, fork_server)


async def test_the_mainland_takes_over(island, make_fleet, open_client, reference):
    last = Span(20, 30)
    async with (
        make_fleet(replicas=1, spans=[Span(0, 10), Span(10, 20)], listen=f"{MAINLAND}:0") as mainland,
        make_fleet(
            island.fork_server, replicas=1, spans=[last], listen=f"{SHORE}:0", bootstrap=mainland.addresses[0]
        ) as shore,
    ):
        (outpost,) = shore.members.values()
        async with open_client(mainland) as client, client.model.session() as session:
            await client.swarm.wait_for_blocks(client.model.info, timeout=30)
            generation = client.model.generate(
                PROMPT, session=session, max_new_tokens=TOKENS, speculation="off"
            )
            text = await anext(generation)
            await mainland.start(last)
            await client.replicas()
            assert outpost.peer in session.chain.peers
            island.cut()
            text += await anext(generation)
            assert outpost.peer not in session.chain.peers
            island.join()
            text += "".join([piece async for piece in generation])
        assert text == await reference.text(PROMPT, TOKENS)
        assert len(client.failovers) >= 1
        # It learns that the session is over, and others learn that it is there.
        async with swarmcore.connect(mainland.addresses[0]) as swarm, asyncio.timeout(LEAK_TIMEOUT):
            await shore.seen_by(swarm)
            while (server := (await swarm.info(outpost.peer)).server).sessions:
                await asyncio.sleep(0.2)
            assert server.cache_tokens_free == server.cache_tokens


async def test_a_client_that_is_cut_off_goes_on_where_it_was(island, make_fleet, open_client, reference):
    async with make_fleet(island.fork_server, replicas=1, listen=f"{SHORE}:0") as shore:
        before = await Census.of(shore)
        async with open_client(shore) as client, client.model.session() as session:
            generation = client.model.generate(
                PROMPT, session=session, max_new_tokens=TOKENS, speculation="off"
            )
            text = await anext(generation)
            island.cut()
            token = asyncio.create_task(anext(generation))
            done, _ = await asyncio.wait([token], timeout=6.0)
            assert not done
            island.join()
            text += await token
            text += "".join([piece async for piece in generation])
        assert text == await reference.text(PROMPT, TOKENS)
        await before.comes_back(shore)
