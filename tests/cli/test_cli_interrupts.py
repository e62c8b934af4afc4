"""Ctrl-C, once and twice, on servers and on clients amid a generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config

TOKENS = 4000


@pytest.fixture(params=["tcp", "webrtc"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "webrtc":
        pytest.importorskip("aiortc", reason="needs the extra webrtc")
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends by itself."""
    folder = tmp_path_factory.mktemp("talkative")
    config = tiny_config("llama")
    config.max_position_embeddings = 2 * TOKENS
    config.vocab_size = 257
    config.eos_token_id = None
    save_random_model(config, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def ended(process, status):
    found, stdout, stderr = process.end()
    assert found == status, stderr
    assert "Traceback" not in stderr
    return stdout


def test_ctrl_c_once_and_twice(start, talkative, transport):
    server = start(
        *("serve", "--model", str(talkative), "--blocks", "0:5", "--transport", transport, "--json"),
        *("--listen", "127.0.0.1:0", "--cache-tokens", str(2 * TOKENS), "--throughput", "100"),
        *("--threads", "1", "--drain", "60"),
    )
    [address] = server.event("online")["addresses"]
    assert address.startswith(f"{transport}://")
    generate = ("generate", "--model", str(talkative), "--bootstrap", address, "--json")
    once, twice = (start(*generate, "--max-new-tokens", str(TOKENS), "Once upon a time") for _ in range(2))
    for client in (once, twice):
        client.event("piece")
    once.signal()
    assert '"generated"' not in ended(once, 130)

    server.signal()
    assert server.event("leaving")["sessions"] >= 1
    server.signal()  # does not wait until the session has gone
    ended(server, 130)
    twice.signal()  # while it looks for another server
    twice.signal()
    ended(twice, 130)
