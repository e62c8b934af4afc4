"""Texts from servers and clients in the hosts of a lab: real processes, the real small model."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

from nat_lab import Host, NatLab

PROMPT = "The sea was calm that morning, and the old fisherman"

RUN_SERVER = Path(__file__).parents[2] / "examples" / "run_server.py"


async def swarmcore_in(lab: NatLab, host: Host, *arguments: str) -> tuple[Process, str]:
    """A listening ``swarmcore`` process and its first address; what it says later is read and dropped."""
    return await online(lab, host, "-m", "swarmcore", *arguments)


async def server_in(lab: NatLab, host: Host, folder: Path, *arguments: str) -> tuple[Process, str]:
    """``examples/run_server.py`` with all blocks of the small model, and its first address."""
    return await online(
        lab,
        host,
        *(str(RUN_SERVER), "--model", str(folder), "--blocks", "0:30", "--dtype", "float32"),
        *("--threads", "1", "--cache-tokens", "1024", "--throughput", "100", *arguments),
    )


async def online(lab: NatLab, host: Host, *program: str) -> tuple[Process, str]:
    process = await lab.run(host, [sys.executable, *program, "--json"], stdout=PIPE)
    assert process.stdout
    async for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "online":
            process.drained = asyncio.ensure_future(process.stdout.read())  # type: ignore[attr-defined]
            return process, event["addresses"][0]
    raise AssertionError(f"{program} ended with status {await process.wait()}")


async def generate(
    lab: NatLab, folder: Path, bootstrap: str, tokens: int, **transport_options: Any
) -> Process:
    """A client in home b, whose lines `pieces` reads."""
    program = str(Path(__file__).with_name("lab_generate.py"))
    argv = [
        sys.executable,
        program,
        str(folder),
        str(tokens),
        PROMPT,
        bootstrap,
        json.dumps(transport_options),
    ]
    return await lab.run("b", argv, stdout=PIPE)


async def pieces(process: Process, count: float = math.inf) -> list[dict[str, Any]]:
    """The next lines of a client, at most up to its end."""
    assert process.stdout
    found = []
    async with asyncio.timeout(90):
        while len(found) < count and (line := await process.stdout.readline()):
            found.append(json.loads(line))
    return found


def plain_text(plain: Any, folder: Path, tokens: int) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = plain.generate(**ids, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return text
