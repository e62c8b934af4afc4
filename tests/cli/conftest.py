"""The command line as processes of its own, which is how people and programs meet it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


class Process:
    """A running Python program."""

    def __init__(self, *arguments: str, stdin: int = subprocess.PIPE, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
        )

    def line(self) -> str:
        """The next line of stdout."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended: {self._process.communicate()}"
        return line.rstrip("\n")

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            event: dict[str, Any] = json.loads(self.line())
            if event["event"] == name:
                return event

    def signal(self, number: int = signal.SIGINT) -> None:
        self._process.send_signal(number)

    def end(self, stdin: str | None = None) -> tuple[int, str, str]:
        """Wait for the end: exit status, and the rest of stdout and stderr."""
        stdout, stderr = self._process.communicate(stdin, timeout=60)
        return self._process.returncode, stdout, stderr

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


Start = Callable[..., Process]


@pytest.fixture
def run_program() -> Iterator[Start]:
    """Starts Python programs; what still runs at the end of the test is killed."""
    started: list[Process] = []

    def begin(*arguments: str, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def start(run_program: Start) -> Start:
    """Starts ``swarmcore`` commands."""
    return functools.partial(run_program, "-m", "swarmcore")


@pytest.fixture(scope="module")
def whole_model_server(smollm2_folder: Path) -> Iterator[str]:
    """The address of one server with all blocks of the real small model."""
    server = Process(
        *("-m", "swarmcore", "serve"),
        *("--model", str(smollm2_folder), "--dtype", "float32", "--threads", "1", "--name", "alone"),
        *("--listen", "127.0.0.1:0", "--cache-tokens", "4096"),
    )
    try:
        yield server.line()
        server.signal()
        assert server.end()[0] == 0
    finally:
        server.kill()
