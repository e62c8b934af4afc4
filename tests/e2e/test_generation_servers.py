"""Generation servers as processes with the real model, killed in mid-text; the client has no part of the
model."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import swarmcore
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once upon a time"


def plain_text(plain: Any, folder: Path, count: int) -> tuple[list[int], str]:
    """What plain Transformers makes of it: its tokens, and their text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = plain.generate(**inputs, max_new_tokens=count, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), text[len(PROMPT) :]


async def start_gateway(fork_server: ForkServer, folder: Path, address: str) -> ServerProcess:
    return await fork_server.start(
        "bootstrap",
        *("--serve-head", "--model", str(folder), "--dtype", "float32", "--threads", "1"),
        *("--listen", "127.0.0.1:0", "--bootstrap", address),
    )


async def busy_server(swarm: swarmcore.Swarm, servers: list[ServerProcess]) -> ServerProcess:
    """Whichever of them has a session."""
    async with asyncio.timeout(30):
        while True:
            for server in servers:
                if (await swarm.info(swarmcore.PeerId(server.peer))).server.sessions:
                    return server
            await asyncio.sleep(0.02)


async def test_texts_outlive_generation_servers_and_their_servers(
    serve, fork_server, smollm2_folder: Path, plain_smollm2
):
    tokens, text = plain_text(plain_smollm2, smollm2_folder, 70)
    async with (
        await serve(smollm2_folder, "0:30", "--serve-head") as first,
        await serve(smollm2_folder, "0:30", "--bootstrap", first.address) as left,
        await serve(smollm2_folder, "0:30", "--bootstrap", first.address) as right,
        swarmcore.connect(left.address) as swarm,
    ):
        generation = swarm.generate(PROMPT, max_new_tokens=70)
        pieces = [await anext(generation) for _ in range(5)]
        assert generation.server == first.peer
        # It goes no more than 64 tokens ahead of what is read, so there is time to start another one.
        async with await start_gateway(fork_server, smollm2_folder, left.address) as gateway:
            async with asyncio.timeout(30):
                while gateway.peer not in swarm.view().servers:
                    await asyncio.sleep(0.02)
            first.signal(signal.SIGKILL)
            pieces += [piece async for piece in generation]
            assert "".join(pieces) == text
            assert generation.tokens == tokens
            assert (generation.server, generation.failovers) == (gateway.peer, 1)

            again = swarm.generate(PROMPT, max_new_tokens=70)
            pieces = [await anext(again) for _ in range(3)]
            (await busy_server(swarm, [left, right])).signal(signal.SIGKILL)
            pieces += [piece async for piece in again]
            assert again.tokens == tokens
            assert "".join(pieces) == text
            assert again.failovers == 0, "its generation server replaced the server"
