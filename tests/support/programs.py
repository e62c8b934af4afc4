"""Python programs as processes: in interpreters of their own, or forked off one that has imported all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from swarmcore.testing.fork_server import ForkServer

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "120"}

END_TIMEOUT = 60.0
"""Seconds for a program to end once it has been told to, or has nothing left to do."""


class Program:
    """A running ``python ARGUMENTS``: forked off ``fork_server``, or else in an interpreter of its own.

    What a module reads from the environment when it is imported has no effect on a forked one.
    """

    def __init__(
        self,
        *arguments: str,
        fork_server: ForkServer | None = None,
        stdin: int = subprocess.PIPE,
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        env = {**os.environ, **ENVIRONMENT, **environment}
        self._process: _Forked | subprocess.Popen[str]
        if fork_server is not None:
            self._process = _Forked(fork_server, arguments, stdin, env, cwd)
        else:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=cwd,
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

    def end(self, stdin: str | None = None, *, timeout: float = END_TIMEOUT) -> tuple[int, str, str]:
        """Wait for the end: exit status, and the rest of stdout and stderr."""
        stdout, stderr = self._process.communicate(stdin, timeout=timeout)
        return self._process.returncode, stdout, stderr

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


Start = Callable[..., Program]


class _Forked:
    """As much of `subprocess.Popen` as `Program` needs, for a process that is not a child of this one."""

    def __init__(
        self,
        fork_server: ForkServer,
        arguments: Sequence[str],
        stdin: int,
        env: Mapping[str, str],
        cwd: Path | None,
    ) -> None:
        read, write = os.pipe() if stdin == subprocess.PIPE else (os.open(os.devnull, os.O_RDONLY), None)
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        with fork_server.launch(arguments, read, their_out, their_err, env=env, cwd=cwd) as control:
            self._statuses = control.makefile()
        for theirs in (read, their_out, their_err):
            os.close(theirs)
        self.stdin = None if write is None else os.fdopen(write, "w")
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.pid = int(self._statuses.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)

    def communicate(self, stdin: str | None = None, timeout: float = END_TIMEOUT) -> tuple[str, str]:
        if self.returncode is not None:
            return "", ""
        with ThreadPoolExecutor(3) as readers:
            streams = [readers.submit(file.read) for file in (self.stdout, self.stderr, self._statuses)]
            try:
                with contextlib.suppress(BrokenPipeError), self.stdin or contextlib.nullcontext():
                    if self.stdin is not None:
                        self.stdin.write(stdin or "")
                stdout, stderr, status = (stream.result(timeout) for stream in streams)
            except BaseException:
                self.kill()
                raise
        self.returncode = int(status)
        for file in (self.stdout, self.stderr, self._statuses):
            file.close()
        return stdout, stderr
