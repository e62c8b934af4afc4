"""The documentation tells the truth: programs run, links lead somewhere, the error tree is that of the code.

A comment above a block says what is done with it:

- ``<!-- run -->``: each command, or the program with the swarm's address as its argument, is run to its end;
- ``<!-- serve -->``: it is started, and has to print an address;
- ``<!-- address -->``: it stands for putting that address into ``$SWARM``;
- ``<!-- not run: why -->``: it is left alone.

An address that is cut short (``tcp://192.168.1.5:40123/12D3KooW…``) stands for that of the first server.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from swarmcore.errors import SwarmError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

MARKED_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>run|serve|address|not run: [^>]+) -->\n)?"
    r"```(?P<language>python|console)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHORT_ADDRESS = re.compile(r"tcp://\S+…")
FILE = re.compile(r"`((?:swarmcore|transports|tests|examples)/[\w/]+\.py)`")
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#\s]+)(?:#[^)]*)?\)")


@attrs.frozen
class Block:
    mark: str | None
    language: str
    body: str
    line: int

    @property
    def commands(self) -> list[str]:
        return [line[2:] for line in self.body.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found["mark"], found["language"], found["body"], text.count("\n", 0, found.start()) + 1)
        for found in MARKED_BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_whether_it_is_run(page: Path) -> None:
    unmarked = [block.line for block in blocks(page) if block.mark is None]
    assert not unmarked, f"{name(page)}: put <!-- run --> or <!-- not run: why --> above lines {unmarked}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            where = f"{name(page)}:{block.line}"
            compile(block.body, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [found["target"] for found in LINK.finditer(page.read_text())]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]
    assert not missing, f"{page.name} names files that are not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_commands_and_options_exist(page: Path) -> None:
    from swarmcore.cli import main

    for block in blocks(page):
        for command in block.commands if block.language == "console" else ():
            words = shlex.split(command.partition("|")[2] or command, comments=True)
            if words[:1] != ["swarmcore"] or words[1].startswith("-"):
                continue
            known = {option for parameter in main.commands[words[1]].params for option in parameter.opts}
            if not known & {"--json"}:  # a group: its own commands have the options
                continue
            used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert used <= known, f"{name(page)}:{block.line}: {used - known} of {words[:2]}"


def test_the_error_tree_is_that_of_the_code() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    printed = page.partition("<!-- error tree")[2].partition("```text\n")[2].partition("```")[0]
    assert printed == error_tree()


def error_tree() -> str:
    lines = ["SwarmError"]

    def add(cls: type[SwarmError], indent: str) -> None:
        children = [sub for sub in cls.__subclasses__() if sub.__module__ == SwarmError.__module__]
        for sub in children:
            last = sub is children[-1]
            summary = re.split(r"(?<=[.:])\s", " ".join((sub.__doc__ or "").split()))[0].rstrip(".:")
            branch = f"{indent}{'└── ' if last else '├── '}{sub.__name__}"
            lines.append(f"{branch:<32}{summary}")
            add(sub, indent + ("    " if last else "│   "))

    add(SwarmError, "")
    return "\n".join(lines) + "\n"


RUN_PAGES = [page for page in PAGES if any(block.mark in ("run", "serve") for block in blocks(page))]


@pytest.mark.e2e
@pytest.mark.parametrize("page", RUN_PAGES, ids=name)
def test_what_the_page_says_works(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if any(block.mark == "serve" for block in blocks(page)):
        request.getfixturevalue("smollm2_folder")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    programs: list[str] = []
    with started_servers() as servers:
        for block in blocks(page):
            where = f"{name(page)}:{block.line}"
            if block.mark == "serve":
                for command in block.commands:
                    command = SHORT_ADDRESS.sub(environment.get("SWARM", ""), command)
                    address = servers.start(command, environment, tmp_path, where)
                    environment.setdefault("SWARM", address)
            elif block.mark == "run" and block.language == "console":
                for command in block.commands:
                    run(["bash", "-euo", "pipefail", "-c", command], environment, tmp_path, where)
            elif block.mark == "run":
                program = tmp_path / f"{page.stem}_line_{block.line}.py"
                program.write_text(block.body)
                programs.append(str(program))
        if programs:
            words = [sys.executable, "-c", RUN_PROGRAMS, environment.get("SWARM", ""), *programs]
            run(words, environment, tmp_path, name(page))


RUN_PROGRAMS = """
import contextlib, io, runpy, sys

from swarmcore.imports import keep_imports

keep_imports()
address, *programs = sys.argv[1:]
for program in programs:
    sys.argv = [program, address]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(program, run_name="__main__")
    assert printed.getvalue().strip(), f"{program} printed nothing"
    print(program, "printed", len(printed.getvalue()), "characters")
"""
"""All programs of a page in one process: most of the time of each goes into importing torch."""


def run(command: list[str], environment: dict[str, str], folder: Path, where: str) -> None:
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{where}: {done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{where} printed nothing"


class Servers:
    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, command: str, environment: dict[str, str], folder: Path, where: str) -> str:
        # On the loopback interface, and on one thread: the machine that runs the tests has others to serve.
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command} --listen 127.0.0.1:0 --threads 1"],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        assert address.startswith("tcp://"), f"{where}: {address}\n{process.stderr.read()}"
        return address


@contextmanager
def started_servers() -> Iterator[Servers]:
    servers = Servers()
    try:
        yield servers
        for process in servers.processes:
            process.send_signal(signal.SIGINT)
        assert [process.wait(timeout=10) for process in servers.processes] == [0] * len(servers.processes)
    finally:
        for process in servers.processes:
            process.kill()
            process.communicate()
