"""A server of ggml runs where neither torch nor Transformers is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
pytest.importorskip("gguf")

from random_gguf import write_random_gguf

PROGRAM = """
import asyncio, json, sys

for name in ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "gguf"):
    sys.modules[name] = None  # importing it fails

from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig
from swarmcore.server.config import ServerConfig
from swarmcore.serving import run_server


async def main(model):
    config = ServerConfig(model=model, cache_tokens=256, threads=1, num_blocks=2)
    online = asyncio.get_running_loop().create_future()
    network = NetworkConfig(transports={"tcp": ["127.0.0.1:0"]})
    serving = asyncio.create_task(
        run_server(config, network, Identity.generate(), on_online=lambda it: online.set_result(it.info))
    )
    await asyncio.wait([serving, online], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving
    info = online.result()
    serving.cancel()
    await asyncio.wait([serving])
    print(json.dumps([info.numerics, info.capabilities, info.pass_tokens, info.decode_rps > 0]))


asyncio.run(main(sys.argv[1]))
"""


def test_a_server_of_ggml_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCORE_CACHE", str(tmp_path / "cache"))
    model = write_random_gguf(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", PROGRAM, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["ggml/f32/f32/f16", [], 0, True]
