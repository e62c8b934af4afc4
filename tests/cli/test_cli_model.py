"""Text from the command line, against a real server with the real small model."""

import json
import os
import subprocess
import sys

import pexpect
import pytest

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"


@pytest.fixture
def client(whole_model_server, smollm2_folder) -> list[str]:
    return ["--bootstrap", whole_model_server, "--model", str(smollm2_folder), "--dtype", "float32"]


def test_generate_from_arguments_and_from_stdin(start, client):
    arguments = start("generate", *client, "--max-new-tokens", "8", "The capital of France is", "--json")
    stdin = start("generate", *client, "--max-new-tokens", "8")
    status, stdout, _ = arguments.end()
    assert status == 0
    *pieces, last = [e for e in map(json.loads, stdout.splitlines()) if e["event"] in ("piece", "generated")]
    assert last["text"] == "".join(piece["text"] for piece in pieces)
    assert last["text"].startswith(" Paris")
    assert (last["new_tokens"], last["finish_reason"]) == (8, "length")
    assert last["tokens_per_step"] >= 1 and last["drafters_set_aside"] == {}
    assert last["drafted"] == sum(each["drafted"] for each in last["drafters"].values()) >= last["accepted"]
    assert stdin.end("The capital of France is")[:2] == (0, last["text"] + "\n")


def test_status_on_a_terminal_of_few_characters(start_afresh, whole_model_server):
    process = start_afresh("status", "--once", "--bootstrap", whole_model_server, PYTHONIOENCODING="ascii")
    status, stdout, stderr = process.end()
    assert (status, stderr) == (0, "")
    assert "111111" in stdout


def test_status_shows_the_server(start, whole_model_server):
    status, stdout, _ = start("status", "--once", "--bootstrap", whole_model_server).end()
    assert status == 0
    assert "alone" in stdout
    assert "complete, every block at least 1 x" in stdout


def test_chat_from_a_pipe_keeps_what_was_said(start, client):
    process = start("chat", *client, "--json", "--max-new-tokens", "24")
    status, stdout, stderr = process.end(f"{QUESTION}\n\nAnd of Italy?\n")
    assert status == 0, stderr
    first, second = [event for event in map(json.loads, stdout.splitlines()) if event["event"] == "answer"]
    assert "Paris" in first["text"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]


def test_chat_with_nothing_to_read_ends(start, client):
    status, stdout, stderr = start("chat", *client, stdin=subprocess.DEVNULL).end()
    assert (status, stdout) == (0, "")
    assert "Traceback" not in stderr


def test_a_piped_chat_whose_turn_fails_is_a_failure(start, client):
    status, _, stderr = start("chat", *client, "--max-new-tokens", "4").end("word " * 9000 + "\n")
    assert status == 1
    assert "error: " in stderr


def test_chat_on_a_terminal(client):
    arguments = ["-m", "swarmcore", "chat", *client, "--max-new-tokens", "2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    with pexpect.spawn(sys.executable, arguments, env=environment, timeout=60, encoding="utf-8") as terminal:
        terminal.expect("Ctrl-D leaves")
        terminal.sendline("/help")
        terminal.expect("is said to the model.*2004h")
        terminal.sendline("Story!")
        terminal.expect("[a-z]+ [a-z]+ [a-z]+")
        terminal.sendintr()  # stops the answer, not the program
        terminal.expect("…")
        terminal.sendline(QUESTION)
        terminal.expect("Paris")
        terminal.expect("2004h")  # the prompt has the terminal
        terminal.sendline("/new")
        terminal.expect("a new conversation")
        terminal.expect("2004h")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
        assert "Traceback" not in (terminal.before or "")


def test_ctrl_c_ends_a_generation_at_once(client):
    arguments = ["-m", "swarmcore", "generate", *client, "--max-new-tokens", "2000", "Once upon a time"]
    with pexpect.spawn(sys.executable, arguments, timeout=60, encoding="utf-8") as terminal:
        terminal.expect("[a-z]{2,}")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 130
        assert "Traceback" not in (terminal.before or "")
