"""One chain over three transports: a server on TCP, one on libp2p, one on WebRTC, and a client with all."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

import swarmcore

pytest.importorskip("libp2p", reason="needs the extra libp2p")
pytest.importorskip("aiortc", reason="needs the extra webrtc")

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once upon a time, in a village by the sea, there lived"
TOKENS = 12
PLACES = {"tcp": "127.0.0.1:0", "libp2p": "/ip4/127.0.0.1/tcp/0", "webrtc": "127.0.0.1:0"}
SPANS = dict(zip(PLACES, ("0:10", "10:20", "20:30"), strict=True))


async def test_a_chain_over_three_transports_says_what_plain_transformers_says(
    fork_server, smollm2_folder, plain_smollm2
):
    from transformers import AutoTokenizer

    async with AsyncExitStack() as stack:
        meeting = [
            f"--listen={scheme}:{'' if place[0] == '/' else '//'}{place}" for scheme, place in PLACES.items()
        ]
        bootstrap = await stack.enter_async_context(
            await fork_server.start("bootstrap", *(f"--transport={scheme}" for scheme in PLACES), *meeting)
        )
        addresses = {address.partition(":")[0]: address for address in bootstrap.online["addresses"]}
        servers = await asyncio.gather(
            *(
                fork_server.start(
                    "serve",
                    *("--model", str(smollm2_folder), "--blocks", SPANS[scheme], "--dtype", "float32"),
                    *("--threads", "1", "--cache-tokens", "1024", "--throughput", "100"),
                    *("--transport", scheme, "--listen", place, "--bootstrap", addresses[scheme]),
                )
                for scheme, place in PLACES.items()
            )
        )
        for server in servers:
            await stack.enter_async_context(server)
        swarm = await stack.enter_async_context(swarmcore.connect(*addresses.values()))
        model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
        await swarm.wait_for_blocks(model.info, timeout=60)
        async with model.session() as session:
            text = await model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
            assert session.chain.peers == tuple(server.peer for server in servers)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = plain_smollm2.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    assert text == tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
