"""Server processes that are online in a fraction of a second, for tests and benchmarks that need hundreds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from swarmcore.errors import DeadlineExceededError, RemoteFaultError
from swarmcore.testing.processes import ServerProcess, peer_environment

START_TIMEOUT = 120.0
"""Seconds for the fork server to import what servers need: a few, on a machine that is not busy."""


class ForkServer:
    """Forks server processes off one that has imported all they need, torch and Transformers included.

    What it starts are processes like those of `ServerProcess.start`, each in a session of its own, computing
    with ``threads`` threads. Entering takes as long as the imports; leaving kills the servers that still run.
    ``prefix`` is a command that runs another one, such as ``("ip", "netns", "exec", "other")``.
    """

    def __init__(self, *, threads: int = 1, prefix: Sequence[str] = ()) -> None:
        self._threads = threads
        self._prefix = tuple(prefix)
        self._process: asyncio.subprocess.Process | None = None
        self._requests: socket.socket | None = None
        self._running: set[ForkedProcess] = set()

    @property
    def pid(self) -> int | None:
        """Of the process that servers are forked off, while there is one."""
        return self._process.pid if self._process is not None else None

    def __repr__(self) -> str:
        return f"<ForkServer {len(self._running)} running>"

    async def start(self, *arguments: str, timeout: float = START_TIMEOUT) -> ServerProcess:
        """As `ServerProcess.start`. Raise `RemoteFaultError` also when the fork server itself is gone."""
        forking = asyncio.create_task(self._fork([*arguments, "--json", "--exit-with-stdin"]))
        try:
            forked = await asyncio.shield(forking)
        except asyncio.CancelledError:
            (await forking).send_signal(signal.SIGKILL)
            raise
        return await ServerProcess.supervise(forked, arguments, timeout=timeout)

    async def __aenter__(self) -> Self:
        self._requests, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *self._prefix,
                    *(sys.executable, "-m", "swarmcore.testing.fork_server_process", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    # OpenMP reads this when torch is imported, and never again.
                    env=peer_environment(OMP_NUM_THREADS=str(self._threads), OMP_WAIT_POLICY="passive"),
                    start_new_session=True,
                )
            async with asyncio.timeout(START_TIMEOUT):
                assert self._process.stdout is not None
                if not await self._process.stdout.readline():
                    raise RemoteFaultError(
                        "the fork server ended before it could start servers; its stderr says why"
                    )
        except BaseException as exc:
            await self._close()
            if isinstance(exc, TimeoutError):
                raise DeadlineExceededError(
                    f"the fork server was not ready in {START_TIMEOUT:.0f} s"
                ) from exc
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        running = list(self._running)
        for forked in running:
            forked.send_signal(signal.SIGKILL)
        await asyncio.gather(*(forked.wait() for forked in running))
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()

    async def _fork(self, arguments: Sequence[str]) -> ForkedProcess:
        if self._requests is None:
            raise RuntimeError(
                "a fork server starts servers once it is entered: async with ForkServer() as …"
            )
        control, their_control = socket.socketpair()
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        try:
            with contextlib.suppress(OSError):  # when the fork server is gone, the control socket ends
                socket.send_fds(self._requests, [b"\n"], [their_control.fileno(), their_stdout, their_stderr])
        finally:
            their_control.close()
            os.close(their_stdout)
            os.close(their_stderr)
        statuses, stdin = await asyncio.open_connection(sock=control)
        readers = await _reader(stdout), await _reader(stderr)
        stdin.write(json.dumps(arguments).encode() + b"\n")
        pid = await _line(statuses)
        if not pid:
            stdin.close()
            raise RemoteFaultError("the fork server ended; its stderr says why")
        forked = ForkedProcess(int(pid), statuses, stdin, *readers)
        self._running.add(forked)
        forked.ended.add_done_callback(lambda _: self._running.discard(forked))
        return forked


class ForkedProcess:
    """A child of the fork server, as `asyncio.subprocess.Process` is a child of this process."""

    def __init__(
        self,
        pid: int,
        statuses: asyncio.StreamReader,
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
    ) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout: asyncio.StreamReader | None = stdout
        self.stderr: asyncio.StreamReader | None = stderr
        self.ended = asyncio.create_task(self._follow(statuses, stdin))

    def send_signal(self, signal: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal)

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    async def _follow(self, statuses: asyncio.StreamReader, stdin: asyncio.StreamWriter) -> int:
        status = await _line(statuses)  # nothing when the fork server is gone: how it ended is not known
        self.returncode = int(status or -signal.SIGKILL)
        stdin.close()
        with contextlib.suppress(OSError):
            await stdin.wait_closed()
        return self.returncode


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; nothing at the end, however that comes."""
    try:
        return await reader.readline()
    except OSError:
        return b""


async def _reader(pipe: int) -> asyncio.StreamReader:
    """What comes out of a pipe, which is closed at its end."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", buffering=0)
    )
    return reader
