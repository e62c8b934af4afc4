"""Real text from a server in one home for a client in another, each behind its router."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import pytest
from netlab.netlab import Host, NatLab, nat_lab

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

pytestmark = pytest.mark.e2e

PROMPT = "The sea was calm that morning, and the old fisherman"
TOKENS = 40
RELAY_PORT = 4001
LISTEN = ("--transport", "libp2p", "--listen")


async def swarmcore_in(lab: NatLab, host: Host, *arguments: str) -> tuple[Process, str]:
    """A listening ``swarmcore`` process and its first address; what it says later is read and dropped."""
    process = await lab.run(host, [sys.executable, "-m", "swarmcore", *arguments, "--json"], stdout=PIPE)
    assert process.stdout
    async for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "online":
            process.drained = asyncio.ensure_future(process.stdout.read())  # type: ignore[attr-defined]
            return process, event["addresses"][0]
    raise AssertionError(f"{arguments[0]} ended with status {await process.wait()}")


async def generate(lab: NatLab, folder: Path, bootstrap: str) -> Process:
    program = str(Path(__file__).with_name("lab_generate.py"))
    argv = [sys.executable, program, str(folder), str(TOKENS), PROMPT, bootstrap]
    return await lab.run("b", argv, stdout=PIPE)


async def pieces(process: Process, count: int = TOKENS + 1) -> list[dict[str, Any]]:
    """The next lines of a client, up to its end."""
    assert process.stdout
    found = []
    async with asyncio.timeout(90):
        while len(found) < count and (line := await process.stdout.readline()):
            found.append(json.loads(line))
    return found


def plain_text(plain: Any, folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = plain.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return text


async def home_with_a_server(lab: NatLab, folder: Path) -> tuple[Process, str]:
    """A public bootstrap peer, which relays, and a server of the whole model in home a."""
    relay, address = await swarmcore_in(lab, "public", "bootstrap", *LISTEN, f"/ip4/0.0.0.0/tcp/{RELAY_PORT}")
    await swarmcore_in(
        lab,
        "a",
        "serve",
        *("--model", str(folder), "--blocks", "0:30", "--dtype", "float32", "--threads", "1"),
        *("--cache-tokens", "1024", "--throughput", "100", "--bootstrap", address),
        *(*LISTEN, "/ip4/0.0.0.0/tcp/4101"),
    )
    return relay, address


async def test_the_relay_dies_once_the_hole_is_punched_and_nothing_stops(smollm2_folder, plain_smollm2):
    async with nat_lab("cone", "cone") as lab:
        relay, address = await home_with_a_server(lab, smollm2_folder)
        client = await generate(lab, smollm2_folder, address)
        said: list[dict[str, Any]] = []
        while not said or said[-1].get("path") != "hole-punched":
            line = await pieces(client, 1)
            assert line, "the client ended before the hole was punched"
            assert "piece" in line[0], "all was generated before the hole was punched"
            said += line
        relay.kill()
        said += await pieces(client)
        assert said.pop() == {"done": True}
        assert said[-1]["path"] == "hole-punched"
        assert "".join(line["piece"] for line in said) == plain_text(plain_smollm2, smollm2_folder)


async def test_symmetric_routers_leave_it_relayed_and_the_text_is_the_same(smollm2_folder, plain_smollm2):
    async with nat_lab("symmetric", "symmetric") as lab:
        _, address = await home_with_a_server(lab, smollm2_folder)
        said = await pieces(await generate(lab, smollm2_folder, address))
        assert said.pop() == {"done": True}
        assert {line["path"] for line in said} == {"relayed"}
        assert "".join(line["piece"] for line in said) == plain_text(plain_smollm2, smollm2_folder)
