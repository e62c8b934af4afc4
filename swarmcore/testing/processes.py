"""Real server processes, for end-to-end tests, benchmarks and demos."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from swarmcore.errors import DeadlineExceededError, RemoteFaultError

LOG_LINES = 200
"""How much of a process's stderr is kept."""

STOP_TIMEOUT = 40.0
"""Seconds a process has to leave after SIGTERM before it is killed; sessions get up to 30 to go elsewhere."""


class Process(Protocol):
    """What `asyncio.subprocess.Process` and other ways to start a process have in common."""

    stdout: asyncio.StreamReader | None
    stderr: asyncio.StreamReader | None

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def send_signal(self, signal: int) -> None: ...
    async def wait(self) -> int: ...


def peer_environment(**changes: str) -> dict[str, str]:
    """The environment for peers that a program starts: they join whom they are told to, and are new peers."""
    mine = {name: value for name, value in os.environ.items() if name != "SWARMCORE_BOOTSTRAP"}
    return {**mine, "SWARMCORE_NEW_IDENTITY": "1", **changes}


class ServerProcess:
    """A ``swarmcore serve`` or ``swarmcore bootstrap`` process of its own, online when `start` returns.

    As a context manager it stops the process at the end, and kills it if it does not leave. The process also
    ends when this one is gone, even by SIGKILL.
    """

    def __init__(self, process: Process, arguments: Sequence[str]) -> None:
        self.arguments = arguments
        self.online: dict[str, Any] = {}
        """The event that the process printed when it came online."""
        self._process = process
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._readers = [asyncio.create_task(self._keep_log(process.stderr))]

    @classmethod
    async def start(
        cls,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        timeout: float = 120.0,
    ) -> ServerProcess:
        """Start ``swarmcore ARGUMENTS --json`` and wait until it is online.

        ``prefix`` is a command that becomes another one, such as ``("ip", "netns", "exec", "other")``.
        Raise `RemoteFaultError` with the process's last words when it ends instead, `DeadlineExceededError`
        when it is not online within ``timeout`` seconds.
        """
        process = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            "-m",
            "swarmcore",
            *arguments,
            *("--json", "--exit-with-stdin"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Never written to: it ends when this process does.
            stdin=asyncio.subprocess.PIPE,
            env=peer_environment(**(env or {})),
            # Ctrl-C in a terminal is for the program that started this process, which then stops it.
            start_new_session=True,
        )
        return await cls.supervise(process, arguments, timeout=timeout)

    @classmethod
    async def supervise(
        cls, process: Process, arguments: Sequence[str], *, timeout: float = 120.0
    ) -> ServerProcess:
        """Take over a process that was started with ``swarmcore ARGUMENTS --json``; otherwise as `start`."""
        server = cls(process, arguments)
        try:
            async with asyncio.timeout(timeout):
                await server._wait_online()
        except BaseException as exc:
            await server.kill()
            if isinstance(exc, TimeoutError):
                raise DeadlineExceededError(
                    f"swarmcore {' '.join(arguments)} was not online within {timeout:.0f} s:\n{server.log}"
                ) from exc
            raise
        return server

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def peer(self) -> str:
        return str(self.online["peer"])

    @property
    def address(self) -> str:
        """The first of its addresses, for ``--bootstrap`` and `swarmcore.connect`."""
        return str(self.online["addresses"][0])

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def log(self) -> str:
        """The latest lines of its stderr."""
        return "\n".join(self._log)

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"exited {self.returncode}"
        return f"<ServerProcess {self.pid} {self.arguments[0]} {state}>"

    def signal(self, number: int) -> None:
        """Send a signal; nothing when the process is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM, then wait; SIGKILL after `STOP_TIMEOUT` seconds. Return the exit status."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # one that was frozen leaves too
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                return await self._finished()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """SIGKILL, as a crash or a power cut would; return the exit status."""
        self.signal(signal.SIGKILL)
        return await self._finished()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    async def _wait_online(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            event = json.loads(line)
            if event.get("event") == "online":
                self.online = event
                self._readers.append(asyncio.create_task(self._discard(self._process.stdout)))
                return
        status = await self._finished()
        command = " ".join(self.arguments)
        raise RemoteFaultError(f"swarmcore {command} ended with status {status}, never online:\n{self.log}")

    async def _finished(self) -> int:
        status = await self._process.wait()
        await asyncio.gather(*self._readers)
        return status

    async def _keep_log(self, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        async for line in stream:
            self._log.append(line.decode(errors="replace").rstrip())

    async def _discard(self, stream: asyncio.StreamReader) -> None:
        while await stream.read(65536):
            pass
