"""The example programs run."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config

import swarmcore

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


async def start(program: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / program),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )


async def test_server_client_and_a_program_of_ones_own(smollm2_folder: Path):
    model = ("--model", str(smollm2_folder))
    server = await start(
        "run_server.py",
        *(*model, "--transport", "tcp", "--blocks", "0:30", "--listen", "127.0.0.1:0", "--threads", "1"),
        "--serve-head",
    )
    running = [server]
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        assert address.startswith("tcp://127.0.0.1:")

        embedded = await start("embed.py", address, str(smollm2_folder), "0")
        running.append(embedded)
        chat = await start("run_client.py", *model, "--bootstrap", address, "--max-new-tokens", "8")
        running.append(chat)
        said, _ = await chat.communicate(b"What is the capital of France?\n")
        assert chat.returncode == 0
        assert said.strip()

        thin = await start("remote_generation.py", address, "--chat", "--max-new-tokens", "8")
        running.append(thin)
        same, _ = await thin.communicate(b"What is the capital of France?\n")
        assert thin.returncode == 0
        assert same.strip()
        assert same.strip() in said

        assert embedded.stdout is not None
        _, _, place = (await embedded.stdout.readline()).decode().strip().rpartition(" ")
        reader, writer = await asyncio.open_connection(*place.split(":"))
        writer.write(b"The capital of France is\n")
        answer = (await reader.readline()).decode()
        assert answer.strip().startswith("Paris")
        writer.close()
        await writer.wait_closed()

        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def test_a_server_is_met_over_webrtc(tmp_path: Path):
    pytest.importorskip("aiortc", reason="needs the extra webrtc")
    config = tiny_config("llama")
    config.vocab_size = 257  # of the tokenizer
    plain, tokenizer = save_random_model(config, tmp_path), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    server = await start(
        "run_server.py",
        *("--model", str(tmp_path), "--transport", "webrtc", "--blocks", "0:5", "--listen", "127.0.0.1:0"),
        *("--dtype", "float32", "--threads", "1", "--throughput", "100"),
    )
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        assert address.startswith("webrtc://127.0.0.1:")
        async with swarmcore.connect(address) as swarm:
            model = await swarm.load_model(str(tmp_path), dtype="float32", threads=1)
            generation = model.generate("Hello", max_new_tokens=6)
            await generation
        server.send_signal(signal.SIGINT)
        assert await server.wait() == 0
    finally:
        if server.returncode is None:
            server.kill()
        await server.communicate()
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False)
    assert generation.tokens == expected[0, ids.shape[1] :].tolist()


async def test_the_demo_loses_a_server_and_says_what_a_plain_run_does(smollm2_folder: Path):
    demo = await start("demo.py", "What is a peer?", "--max-new-tokens", "8")
    said, _ = await demo.communicate()
    assert demo.returncode == 0
    assert b"took over" in said
    assert b"the same" in said


async def test_a_prompt_is_tuned_while_servers_come_and_go(smollm2_folder: Path):
    tuning = await start("prompt_tuning.py", "--quick")
    said, _ = await tuning.communicate()
    assert tuning.returncode == 0
    assert b"kill -9" in said
    assert b"joined" in said
    assert said.count(b"In short, the film is") == 2, "a new process generates with what was saved"


async def test_low_rank_updates_are_trained_and_served_by_name(smollm2_folder: Path):
    lora = await start("lora.py")
    said, _ = await lora.communicate()
    assert lora.returncode == 0
    assert b"served:  The harbour master of Ebbfleet is called Ottoline" in said


async def test_clients_that_seldom_talk_train_one_thing(smollm2_folder: Path):
    training = await start("local_steps.py", "--quick")
    said, _ = await training.communicate()
    assert training.returncode == 0
    assert b"times fewer bytes" in said
    assert b"the same, bit for bit" in said
