"""Server processes that are online in a fraction of a second, for tests and benchmarks that need hundreds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from swarmcore.errors import DeadlineExceededError, RemoteFaultError
from swarmcore.testing.processes import ServerProcess, peer_environment

START_TIMEOUT = 120.0
"""Seconds for the fork server to import what servers need: a few, on a machine that is not busy."""


class ForkServer:
    """Forks processes off one that has imported all they need, torch and Transformers included.

    Servers are processes like those of `ServerProcess.start`, each in a session of its own, computing with
    ``threads`` threads; `launch` runs any program. Entering takes as long as the imports; leaving kills the
    servers that still run. It is entered with ``with`` or ``async with``; servers need an event loop, not
    always the same one. ``prefix`` is a command that runs another one, such as
    ``("ip", "netns", "exec", "other")``. ``preload`` names modules to import in place of those.
    """

    def __init__(self, *, threads: int = 1, prefix: Sequence[str] = (), preload: Sequence[str] = ()) -> None:
        self._threads = threads
        self._prefix = tuple(prefix)
        self._preload = tuple(preload)
        self._process: subprocess.Popen[bytes] | None = None
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
        forking = asyncio.create_task(
            self._fork(["-m", "swarmcore", *arguments, "--json", "--exit-with-stdin"])
        )
        try:
            forked = await asyncio.shield(forking)
        except asyncio.CancelledError:
            (await forking).send_signal(signal.SIGKILL)
            raise
        return await ServerProcess.supervise(forked, arguments, timeout=timeout)

    def launch(
        self,
        arguments: Sequence[str],
        stdin: int,
        stdout: int,
        stderr: int,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> socket.socket:
        """Have ``python ARGUMENTS`` run in a forked process, with these descriptors, which stay the caller's.

        ``ARGUMENTS`` are ``-m MODULE …`` or ``FILE …``. Two lines can be read from the socket: the program's
        pid and, once it has ended, its exit status, negative for a signal. When the fork server is gone, the
        socket ends instead, as soon as the program has ended too.
        """
        if self._requests is None:
            raise RuntimeError(
                "a fork server starts programs once it is entered: async with ForkServer() as …"
            )
        environment = peer_environment() if env is None else env
        request = json.dumps([list(arguments), dict(environment), str(cwd or Path.cwd())])
        control, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # when the fork server is gone, the control socket ends
            control.sendall(request.encode() + b"\n")
            socket.send_fds(self._requests, [b"\n"], [theirs.fileno(), stdin, stdout, stderr])
        return control

    def __enter__(self) -> Self:
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *self._prefix,
                    *(sys.executable, "-m", "swarmcore.testing.fork_server_process", str(theirs.fileno())),
                    *self._preload,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                # OpenMP reads this when torch is imported, and never again.
                env=peer_environment(OMP_NUM_THREADS=str(self._threads), OMP_WAIT_POLICY="passive"),
                start_new_session=True,
            )
        try:
            self._wait_ready(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end()

    async def __aenter__(self) -> Self:
        entering = asyncio.create_task(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            await asyncio.wait([entering])
            self._end()
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        running = list(self._running)
        for forked in running:
            forked.send_signal(signal.SIGKILL)
        await asyncio.gather(*(forked.wait() for forked in running))
        self._end()

    @staticmethod
    def _wait_ready(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
        if not readable:
            raise DeadlineExceededError(f"the fork server was not ready in {START_TIMEOUT:.0f} s")
        if not process.stdout.readline():
            raise RemoteFaultError("the fork server ended before it could start servers; its stderr says why")

    def _end(self) -> None:
        for forked in self._running:
            forked.send_signal(signal.SIGKILL)
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    async def _fork(self, arguments: Sequence[str]) -> ForkedProcess:
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        theirs = (stdin[0], stdout[1], stderr[1])
        try:
            control = self.launch(arguments, *theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        with contextlib.ExitStack() as unless_forked:
            unless_forked.callback(os.close, stdin[1])
            readers = await _reader(stdout[0]), await _reader(stderr[0])
            statuses, writer = await asyncio.open_connection(sock=control)
            unless_forked.callback(writer.close)
            pid = await _line(statuses)
            if not pid:
                raise RemoteFaultError("the fork server ended; its stderr says why")
            unless_forked.pop_all()
        forked = ForkedProcess(int(pid), statuses, writer, stdin[1], *readers)
        self._running.add(forked)
        forked.ended.add_done_callback(lambda _: self._running.discard(forked))
        return forked


class ForkedProcess:
    """A child of the fork server, as `asyncio.subprocess.Process` is a child of this process."""

    def __init__(
        self,
        pid: int,
        statuses: asyncio.StreamReader,
        control: asyncio.StreamWriter,
        stdin: int,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
    ) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout: asyncio.StreamReader | None = stdout
        self.stderr: asyncio.StreamReader | None = stderr
        self.ended = asyncio.create_task(self._follow(statuses, control, stdin))

    def send_signal(self, signal: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal)

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    async def _follow(self, statuses: asyncio.StreamReader, control: asyncio.StreamWriter, stdin: int) -> int:
        status = await _line(statuses)  # nothing when the fork server is gone: how it ended is not known
        self.returncode = int(status or -signal.SIGKILL)
        os.close(stdin)
        control.close()
        with contextlib.suppress(OSError):
            await control.wait_closed()
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
