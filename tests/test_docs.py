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
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from programs import Program

from swarmcore.errors import SwarmError
from swarmcore.testing.fork_server import ForkServer

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


def test_the_map_names_files_that_are_there() -> None:
    """A file that is named without its folder lies in that of the file before it on its line."""
    missing = []
    for line in (ROOT / "docs/map.md").read_text().splitlines():
        folder = ROOT
        for named in re.findall(r"`([\w./]+\.py)`", line):
            file = ROOT / named if "/" in named else folder / named
            folder = file.parent
            if not file.exists():
                missing.append(named)
    assert not missing


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
    shell = Shell(request.getfixturevalue("fork_server"), tmp_path)
    try:
        for block in blocks(page):
            where = f"{name(page)}:{block.line}"
            if block.mark == "serve":
                for command in block.commands:
                    shell.serve(SHORT_ADDRESS.sub(shell.swarm, command))
            elif block.mark == "run" and block.language == "console":
                for command in block.commands:
                    shell.run(command, where)
            elif block.mark == "run":
                program = tmp_path / f"{page.stem}_line_{block.line}.py"
                program.write_text(block.body)
                shell.end(shell.start(str(program), shell.swarm), where)
        shell.interrupt_servers()
    finally:
        shell.kill()


class Shell:
    """Does what a reader does in a terminal, and what happens there when the page is left."""

    def __init__(self, fork_server: ForkServer, folder: Path) -> None:
        self.swarm = ""
        """The address of the first server."""
        self._fork_server = fork_server
        self._folder = folder
        self._servers: list[Program] = []
        self._started: list[Program] = []

    def start(self, *arguments: str) -> Program:
        """``python ARGUMENTS``"""
        program = Program(*arguments, fork_server=self._fork_server, cwd=self._folder, SWARM=self.swarm)
        self._started.append(program)
        return program

    def serve(self, command: str) -> None:
        """Start a server, on the loopback interface and one thread: this machine has others to serve."""
        words = self._words(f"{command} --listen 127.0.0.1:0 --threads 1")
        assert words is not None, command
        server = self.start("-m", *words)
        self._servers.append(server)
        address = server.line()
        assert address.startswith("tcp://"), f"{command}: {address}"
        self.swarm = self.swarm or address

    def run(self, command: str, where: str) -> None:
        words = self._words(command)
        if words is not None:
            self.end(self.start("-m", *words), where)
            return
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env={**os.environ, "PATH": path, "SWARM": self.swarm},
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        check_end(done.returncode, done.stdout, done.stderr, where)

    def end(self, program: Program, where: str) -> None:
        check_end(*program.end(timeout=120), where)

    def interrupt_servers(self) -> None:
        for server in self._servers:
            server.signal()
        assert [server.end()[0] for server in self._servers] == [0] * len(self._servers)

    def kill(self) -> None:
        for program in self._started:
            program.kill()

    def _words(self, command: str) -> list[str] | None:
        """The words of a command of ours; nothing where it takes a real shell."""
        words = shlex.split(command.replace("$SWARM", self.swarm))
        return words if words[0] == "swarmcore" and not set(command) & set("|<>&;`()") else None


def check_end(status: int, stdout: str, stderr: str, where: str) -> None:
    assert status == 0, f"{where}: {stdout}\n{stderr}"
    assert stdout.strip(), f"{where} printed nothing"
