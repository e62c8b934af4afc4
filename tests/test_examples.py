"""The example programs run."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from programs import Program, Start
from tiny_models import save_random_model, tiny_config

import swarmcore
from swarmcore.testing.fork_server import ForkServer

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def start(fork_server: ForkServer) -> Iterator[Start]:
    """Starts an example; what still runs at the end of the test is killed."""
    started: list[Program] = []

    def begin(program: str, *arguments: str) -> Program:
        started.append(Program(str(EXAMPLES / program), *arguments, fork_server=fork_server))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


def ended(program: Program, stdin: str | None = None) -> str:
    """What the program printed."""
    status, stdout, stderr = program.end(stdin, timeout=300)
    assert status == 0, stderr
    return stdout


async def test_server_client_and_a_program_of_ones_own(start: Start, smollm2_folder: Path):
    model = ("--model", str(smollm2_folder))
    server = start(
        "run_server.py",
        *(*model, "--transport", "tcp", "--blocks", "0:30", "--listen", "127.0.0.1:0", "--threads", "1"),
        "--serve-head",
    )
    address = server.line()
    assert address.startswith("tcp://127.0.0.1:")

    embedded = start("embed.py", address, str(smollm2_folder), "0")
    chat = start("run_client.py", *model, "--bootstrap", address, "--max-new-tokens", "8")
    said = ended(chat, "What is the capital of France?\n")
    assert said.strip()

    thin = start("remote_generation.py", address, "--chat", "--max-new-tokens", "8")
    same = ended(thin, "What is the capital of France?\n")
    assert same.strip()
    assert same.strip() in said

    _, _, place = embedded.line().rpartition(" ")
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(b"The capital of France is\n")
    answer = (await reader.readline()).decode()
    assert answer.strip().startswith("Paris")
    writer.close()
    await writer.wait_closed()

    server.signal(signal.SIGTERM)
    ended(server)


async def test_a_server_is_met_over_webrtc(start: Start, tmp_path: Path):
    pytest.importorskip("aiortc", reason="needs the extra webrtc")
    config = tiny_config("llama")
    config.vocab_size = 257  # of the tokenizer
    plain, tokenizer = save_random_model(config, tmp_path), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    server = start(
        "run_server.py",
        *("--model", str(tmp_path), "--transport", "webrtc", "--blocks", "0:5", "--listen", "127.0.0.1:0"),
        *("--dtype", "float32", "--threads", "1", "--throughput", "100"),
    )
    address = await asyncio.to_thread(server.line)
    assert address.startswith("webrtc://127.0.0.1:")
    async with swarmcore.connect(address) as swarm:
        model = await swarm.load_model(str(tmp_path), dtype="float32", threads=1)
        generation = model.generate("Hello", max_new_tokens=6)
        await generation
    server.signal()
    ended(server)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False)
    assert generation.tokens == expected[0, ids.shape[1] :].tolist()


def test_the_demo_loses_a_server_and_says_what_a_plain_run_does(start: Start, smollm2_folder: Path):
    said = ended(start("demo.py", "What is a peer?", "--max-new-tokens", "8"))
    assert "took over" in said
    assert "the same" in said


def test_a_prompt_is_tuned_while_servers_come_and_go(start: Start, smollm2_folder: Path):
    said = ended(start("prompt_tuning.py", "--quick"))
    assert "kill -9" in said
    assert "joined" in said
    assert said.count("In short, the film is") == 2, "a new process generates with what was saved"


def test_low_rank_updates_are_trained_and_served_by_name(start: Start, smollm2_folder: Path):
    said = ended(start("lora.py"))
    assert "served:  The harbour master of Ebbfleet is called Ottoline" in said


def test_clients_that_seldom_talk_train_one_thing(start: Start, smollm2_folder: Path):
    said = ended(start("local_steps.py", "--quick"))
    assert "times fewer bytes" in said
    assert "the same, bit for bit" in said
