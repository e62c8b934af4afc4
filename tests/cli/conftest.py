"""The command line as processes of its own, which is how people and programs meet it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Program, Start

from swarmcore.testing.fork_server import ForkServer


@pytest.fixture
def run_program() -> Iterator[Start]:
    """Starts Python programs; what still runs at the end of the test is killed."""
    started: list[Program] = []

    def begin(*arguments: str, **options: Any) -> Program:
        started.append(Program(*arguments, **options))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


@pytest.fixture
def start(run_program: Start, fork_server: ForkServer) -> Start:
    """Starts ``swarmcore`` commands, in processes that need not import anything first."""
    return functools.partial(run_program, "-m", "swarmcore", fork_server=fork_server)


@pytest.fixture
def start_afresh(run_program: Start) -> Start:
    """Starts ``swarmcore`` commands as a shell does, each in an interpreter of its own."""
    return functools.partial(run_program, "-m", "swarmcore")


@pytest.fixture(scope="module")
def whole_model_server(smollm2_folder: Path, fork_server: ForkServer) -> Iterator[str]:
    """The address of one server with all blocks of the real small model."""
    server = Program(
        *("-m", "swarmcore", "serve"),
        *("--model", str(smollm2_folder), "--dtype", "float32", "--threads", "1", "--name", "alone"),
        *("--listen", "127.0.0.1:0", "--cache-tokens", "4096"),
        fork_server=fork_server,
    )
    try:
        yield server.line()
        server.signal()
        assert server.end()[0] == 0
    finally:
        server.kill()
