"""kill -9 in the middle: what is left goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from programs import Program

import swarmcore
from swarmcore.errors import MissingBlocksError
from swarmcore.testing.fork_server import ForkServer
from swarmcore.types import PeerId

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

CLIENT = """
import asyncio, sys, swarmcore

async def main(bootstrap, folder):
    async with swarmcore.connect(bootstrap) as swarm:
        model = await swarm.load_model(folder, dtype="float32", threads=1)
        async for piece in model.generate("Tell me everything:", max_new_tokens=2000):
            print(repr(piece), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


async def free_cache(swarm: swarmcore.Swarm, peers: list[str]) -> list[int]:
    replies = [await swarm.info(PeerId(peer)) for peer in peers]
    return [reply.server.cache_tokens_free for reply in replies]


async def until_cache_is(swarm: swarmcore.Swarm, peers: list[str], expected: list[int]) -> None:
    async with asyncio.timeout(30):
        while await free_cache(swarm, peers) != expected:
            await asyncio.sleep(0.1)


async def test_a_killed_client_frees_its_cache_and_hurts_no_other(
    three_servers, swarm, model, smollm2_folder: Path, fork_server: ForkServer, tmp_path: Path
):
    peers = [server.peer for server in three_servers]
    await until_cache_is(swarm, peers, [4096] * 3)
    program = tmp_path / "client.py"
    program.write_text(CLIENT)
    client = Program(str(program), three_servers[0].address, str(smollm2_folder), fork_server=fork_server)
    for _ in range(3):
        await asyncio.to_thread(client.line)
    assert all(free < 4096 for free in await free_cache(swarm, peers))
    pieces = []
    async for piece in model.generate("The sea is", max_new_tokens=12):
        pieces.append(piece)
        if len(pieces) == 3:
            client.signal(signal.SIGKILL)
    assert len(pieces) > 3
    await asyncio.to_thread(client.kill)
    await until_cache_is(swarm, peers, [4096] * 3)


async def test_sessions_without_a_replacement_end_when_patience_does_and_no_others(
    serve, swarm, model, smollm2_folder: Path
):
    async with (
        await serve(smollm2_folder, "0:15") as left,
        await serve(smollm2_folder, "15:30", "--bootstrap", left.address) as right,
        swarmcore.connect(left.address) as pair,
    ):
        options = swarmcore.SessionOptions(patience=1.0)
        other = await pair.load_model(
            str(smollm2_folder), dtype="float32", threads=1, session_options=options
        )
        await pair.wait_for_blocks(other.info, timeout=30)
        with pytest.raises(MissingBlocksError, match="15:30"):
            async with asyncio.timeout(20):
                async for _ in other.generate("Count:", max_new_tokens=2000):
                    right.signal(signal.SIGKILL)
        # The survivor has its cache back, and the other swarm never noticed.
        await until_cache_is(pair, [left.peer], [4096])
    text = "".join([piece async for piece in model.generate("The sea is", max_new_tokens=5)])
    assert text
    assert len(swarm.view()) == 3
