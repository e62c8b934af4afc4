"""What the commands accept and refuse, without a process of their own."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarmcore.cli import main
from swarmcore.identity import Identity

ADDRESS = f"tcp://127.0.0.1:1/{Identity.generate().peer}"


def invoke(*arguments: str, stdin: str = ""):
    return CliRunner().invoke(main, arguments, input=stdin)


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("serve", "bootstrap", "chat", "generate", "status", "convert", "bench"):
        assert f"\n  {command} " in result.output


@pytest.mark.parametrize("command", ["serve", "bootstrap", "chat", "generate", "status", "convert"])
def test_every_command_has_help_json_and_debug(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert {"--json", "--debug", "--log-level"} <= set(result.output.split())


def test_the_command_line_loads_no_model_library():
    code = (
        "import sys; from swarmcore.cli import main; main(['serve', '--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'numpy', 'libp2p', 'aiortc', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--model", "m", "--blocks", "10:5"], "block range '10:5' is not of the form START:END"),
        (["serve", "--model", "m", "--blocks", "all"], "block range 'all' is not of the form START:END"),
        (["serve", "--model", "m", "--cache-tokens", "0"], "cache-tokens must be above 0"),
        (["serve", "--model", "m", "--threads", "-1"], "threads must be above 0"),
        (["serve", "--model", "m", "--num-blocks", "0"], "num-blocks must be above 0"),
        (["serve", "--model", "m", "--num-blocks", "3", "--blocks", "0:3"], "leave out --num-blocks"),
        (["serve", "--model", "m", "--throughput", "fast"], "'fast' is neither a number, nor auto"),
        (["serve", "--model", "m", "--throughput", "0"], "throughput must be above 0"),
        (["serve", "--model", "m", "--balance-quality", "2"], "balance-quality must be from 0 to 1"),
        (["serve", "--model", "m", "--drain", "-1"], "drain must not be below 0"),
        (["generate", "--bootstrap", ADDRESS, "Hi", "--top-k", "5"], "top_k only matters when sampling"),
        (["generate", "--bootstrap", ADDRESS, "Hi", "--thin", "--temperature", "nan"], "temperature must be"),
        (["generate", "--bootstrap", ADDRESS, "Hi", "--stop", ""], "stop must be a text"),
        (["generate", "--bootstrap", ADDRESS, "abc \ud83d"], "the prompt has half a character"),
        (["chat", "--bootstrap", ADDRESS, "--min-p", "0.5"], "min_p only matters when sampling"),
        (["chat", "--bootstrap", ADDRESS, "--seed", "-1"], "seed must be"),
        (["bootstrap", "--transport", "carrier-pigeon"], "no transport for 'carrier-pigeon' (installed: "),
        (["bootstrap", "--listen", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["bootstrap", "--listen", "udp://127.0.0.1:0"], "add --transport udp"),
        (["bootstrap", "--bootstrap", "127.0.0.1:4001"], "has no transport scheme"),
        (["bootstrap", "--bootstrap", "tcp://127.0.0.1:4001"], "does not end in a peer id"),
        (["bootstrap", "--allow-peer", "12D3KooWfriend"], "is not the peer id of an Ed25519 key"),
        (["status", "--once", "--bootstrap", "tcp://h:1"], "does not end in a peer id"),
        (
            ["bootstrap", "--mdns", "--relay", "on"],
            "--relay, --mdns: only for transport libp2p; add --transport",
        ),
        (["bootstrap", "--no-upnp"], "--no-upnp: only for transport libp2p"),
        (["bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0"], "add --transport libp2p"),
        (["generate", "--bootstrap", ADDRESS], "the prompt is empty"),
        (["bootstrap", "--serve-head"], "--serve-head and --model go together"),
        (["bootstrap", "--model", "somewhere"], "--serve-head and --model go together"),
        (
            ["generate", "--bootstrap", ADDRESS, "--allow-server", "friend", "Hi"],
            "'friend' is not the peer id",
        ),
        (["generate", "--bootstrap", ADDRESS, "--block-server", "foe", "Hi"], "'foe' is not the peer id"),
        (["bench", "transport", "--transport", ","], "nothing to measure; name transports"),
        (["bench", "transport", "--transport", "tcp:"], "'tcp:' is not of the form SCHEME or SCHEME:ENGINE"),
        (["bench", "transport", "--transport", "tcp:fast"], "transport tcp has no engines to choose from"),
        (["bench", "transport", "--listen", "127.0.0.1:0"], "could be a place of any of tcp, memory"),
        (["bench", "transport", "--delay", "-1"], "a delay of -1 ms is below 0"),
        (["bench", "transport", "--loss", "200"], "a loss of 200 % is not from 0 to 50"),
        (["bench", "transport", "--rate", "0"], "a rate of 0 Mbit/s is not above 0"),
        (["bench", "transport", "--delay", "5"], "memory is within one process and passes no link"),
    ],
)
def test_wrong_input_is_one_line_that_says_what(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_swarm_that_does_not_answer_is_no_fault_of_the_input():
    result = invoke("status", "--once", "--bootstrap", ADDRESS)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_link_that_cannot_be_emulated_is_no_fault_of_the_input(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = invoke("bench", "transport", "--transport", "tcp", "--delay", "25")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no link can be emulated here: network namespaces need root; ")


def test_with_json_an_error_is_an_event_too():
    result = invoke("bootstrap", "--bootstrap", "nonsense", "--json")
    event = json.loads(result.stdout)
    assert (event["event"], event["error"]) == ("error", "AddressError")
    assert event["message"] in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--bogus", "Hi"], "No such option '--bogus'"),
        (["serve"], "Missing option '--model'"),
        (["srve"], "No such command 'srve'"),
        (["bench", "transport", "--rounds", "many"], "'many' is not a valid integer"),
    ],
)
def test_with_json_what_click_refuses_is_an_event_too(arguments, message):
    assert invoke(*arguments).stdout == ""
    result = invoke(*arguments, "--json")
    event = json.loads(result.stdout)
    assert (result.exit_code, event["event"], event["error"]) == (2, "error", "InputError")
    assert message in event["message"]


def test_debug_shows_the_traceback():
    result = invoke("bootstrap", "--bootstrap", "nonsense", "--debug")
    assert type(result.exception).__name__ == "AddressError"


@pytest.mark.parametrize("damage", ["not a key", ""])
def test_a_bad_identity_file(tmp_path, damage):
    file = tmp_path / "key"
    file.write_text(damage)
    file.chmod(0o600)
    result = invoke("bootstrap", "--identity", str(file))
    assert result.exit_code == 2
    assert f"error: identity file {file} is not an unencrypted PEM private key" in result.stderr


@pytest.mark.parametrize("place", [".", "a file/key"])
def test_an_identity_file_that_cannot_be_one(tmp_path, place):
    (tmp_path / "a file").write_text("")
    result = invoke("bootstrap", "--identity", str(tmp_path / place))
    assert result.exit_code == 2
    assert f"error: identity file {tmp_path / place} " in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_identity_file_that_others_can_read(tmp_path):
    file = tmp_path / "key"
    Identity.load_or_create(file)
    file.chmod(0o644)
    result = invoke("bootstrap", "--identity", str(file))
    assert result.exit_code == 2
    assert f"chmod 600 {file}" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="streams are closed by a shell")
def test_closed_streams_are_nothing_to_read_and_nowhere_to_write():
    code = (
        "import os, sys; from swarmcore.cli import main\n"
        "try: main(['identity', '--help'])\n"
        "except SystemExit: pass\n"
        "numbers = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]\n"
        "sys.exit(numbers != [0, 1, 2])"
    )
    closed = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["identity", "key"]])
def test_output_on_a_full_disk_ends_in_one_line(arguments, tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "swarmcore", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: nothing more can be written: No space left on device"
    assert "Traceback" not in done.stderr
