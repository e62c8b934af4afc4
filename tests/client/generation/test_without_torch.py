"""Texts in an environment without torch: what swarmcore brings without extras, and no more."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_swarm import served

from swarmcore import sync
from swarmcore.distribution import NAME
from swarmcore.head.queue import GenerationLimits

ROOT = Path(__file__).parents[3]

PROGRAM = """
import asyncio, importlib.util, sys
import swarmcore

async def main(address):
    async with swarmcore.connect(address) as swarm:
        async for piece in swarm.generate("The sea", max_new_tokens=12):
            print(piece, end="")

assert importlib.util.find_spec("torch") is None
asyncio.run(main(sys.argv[1]))
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout, built."""
    folder = tmp_path_factory.mktemp("built")
    # A copy, since building leaves things in the folder it is built from.
    source = folder / "source"
    for name in ("swarmcore", "transports"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path) -> Path:
    """The interpreter of a new one, with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*PIP, "--python", python, "install", "--no-compile", *what]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of an environment with this checkout and its base dependencies; takes some seconds."""
    python = environment(tmp_path_factory.mktemp("thin") / "venv")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = install(python, "--retries", "1", "--timeout", "5", "-c", ROOT / "constraints.txt", *needed)
    if re.search("connection|resolve|Retrying", installed.stderr, re.IGNORECASE) and installed.returncode:
        pytest.skip(f"the package index cannot be reached: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    assert install(python, "--no-deps", wheel).returncode == 0
    return python


def needed_with(extra: str) -> set[str]:
    """The distributions that an install with ``extra`` brings, as far as they are installed here."""
    found: set[str] = set()
    waiting = {(NAME, ""), (NAME, extra)}
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, option = waiting.pop()
        seen.add((name, option))
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": option}):
                wanted = canonicalize_name(requirement.name)
                waiting |= {(wanted, each) for each in ("", *requirement.extras)} - seen
    return found - {NAME}


@pytest.fixture(scope="module", params=["libp2p", "webrtc"])
def extra(request: pytest.FixtureRequest) -> str:
    """One that brings a transport."""
    name: str = request.param
    pytest.importorskip({"webrtc": "aiortc"}.get(name, name), reason=f"needs the extra {name}")
    return name


@pytest.fixture(scope="module")
def python_with(extra: str, tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """As `python`, with an extra. Links to what is installed here save most of the time."""
    python = environment(tmp_path_factory.mktemp(extra) / "venv")
    (packages,) = python.parent.parent.glob("lib/*/site-packages")
    for name in needed_with(extra):
        files = metadata.distribution(name).files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(metadata.distribution(name).locate_file(top))
    assert install(python, "--no-deps", wheel).returncode == 0
    return python


@pytest.fixture(scope="module")
def address(llama_folder: Path) -> Iterator[str]:
    with served(llama_folder, "0:3", heads=[GenerationLimits()]) as servers:
        yield str(servers[0].node.addresses[0])


def run(*command: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd="/"
    )


def test_text_without_torch(python: Path, address: str) -> None:
    expected = sync_text(address)
    done = run(python, "-c", PROGRAM, address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected
    words = ("generate", "--bootstrap", address, "--max-new-tokens", "12", "The sea")
    command = run(python, "-m", "swarmcore", *words)
    assert command.returncode == 0
    assert command.stdout == expected + "\n"
    remark = "torch is not installed here: a generation server makes the text, as with --thin\n"
    assert command.stderr == remark


def test_text_without_torch_over_other_transports(python_with: Path, extra: str, llama_folder: Path) -> None:
    with served(llama_folder, "0:3", heads=[GenerationLimits()], transport=extra) as servers:
        address = str(servers[0].node.addresses[0])
        assert address.startswith(f"{extra}:")
        done = run(python_with, "-c", PROGRAM, address)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == sync_text(address)


def test_a_chat_without_torch(python: Path, address: str) -> None:
    with sync.connect(address) as swarm, swarm.chat(system="Be brief.") as chat:
        expected = ["".join(chat.say(text, max_new_tokens=6)) for text in ("Hi", "And?")]
        assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 2]
    options = ("--system", "Be brief.", "--max-new-tokens", "6", "--json")
    done = run(python, "-m", "swarmcore", "chat", "--bootstrap", address, *options, said="Hi\nAnd?\n")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    answers = [event for event in events if event["event"] == "answer"]
    assert [answer["text"] for answer in answers] == expected
    assert all(address.endswith(answer["head"]) for answer in answers)


def sync_text(address: str) -> str:
    with sync.connect(address) as swarm:
        return swarm.generate("The sea", max_new_tokens=12).text()


def test_waiting_for_text_is_that_of_plain_transformers(address: str, plain_tokens) -> None:
    with sync.connect(address) as swarm:
        generation = swarm.generate("The sea", max_new_tokens=12)
        pieces = list(generation)
        assert len(pieces) > 1
        assert generation.tokens == plain_tokens("The sea", 12)
        assert generation.finish_reason == "length"
        assert generation.seconds > 0
        assert generation.server in swarm.view().servers
        sampled = swarm.generate("The sea", max_new_tokens=12, temperature=0.9, seed=3, top_k=0)
        sampled.text()
        assert sampled.tokens == plain_tokens("The sea", 12, seed=3, temperature=0.9, top_k=0)
        chat = swarm.generate([{"role": "user", "content": "Hi"}], max_new_tokens=8)
        chat.text()
        assert chat.tokens == plain_tokens("<user>Hi\n<assistant>", 8)


def test_the_way_of_a_thin_client_imports_no_torch(address: str) -> None:
    program = PROGRAM.replace('assert importlib.util.find_spec("torch") is None\n', "")
    assert "find_spec" not in program
    done = run(sys.executable, "-c", program, address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
