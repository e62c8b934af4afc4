"""The process of a `ForkServer`: imports what servers need, then forks a Python program for each request.

``python -m swarmcore.testing.fork_server_process FD [MODULE…]``, where FD is a Unix socket and the modules,
if any, are imported in place of `PRELOADED` and `PRELOADED_EXTRAS`. A request is one byte on the socket with
four descriptors: a control socket, then the stdin, stdout and stderr of the program. From the control socket
comes a line of JSON: the arguments that ``python`` would be given, the environment and the folder. What is
written to it are the program's pid and, once it has ended, its exit status, negative for a signal.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

PRELOADED = (
    "swarmcore.cli",
    "swarmcore.serving",
    "swarmcore.client.generation.model",
    "swarmcore.executor.torch.executor",
    "swarmcore_transports.tcp",
    "transformers.models.llama.modeling_llama",
)
"""Importing these starts no thread, no event loop and no CUDA: none of that would survive a fork."""

PRELOADED_EXTRAS = ("swarmcore_transports.libp2p", "swarmcore_transports.webrtc")
"""Likewise, where what they need is installed."""


class Forker:
    """Forks programs, and reports how they ended. Everything is done in one thread, one thing at a time."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._running: dict[int, socket.socket] = {}
        self._exit_status: int | None = None
        """In a child: with what it ends."""

    def run(self) -> None:
        """Fork until the requests end; programs that still run then are left alone. Return in each child."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake.fileno())
        while self._exit_status is None:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(4096)
                self._reap()
            if self._requests in ready:
                request, descriptors, _, _ = socket.recv_fds(self._requests, 1, 4)
                if not request:
                    return
                self._fork(*descriptors)

    def end_child(self) -> None:
        """What a child does last: end without clearing away, and so copying, all that was imported."""
        if self._exit_status is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                    stream.flush()
            os._exit(self._exit_status)

    def _fork(self, control: int, *standard: int) -> None:
        with open(control, "rb", closefd=False) as lines:
            arguments, environment, folder = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            # Its control socket stays open here, so that its end says that this process has ended, too.
            os.set_inheritable(control, False)
            self._become_program(environment, standard)
            os.chdir(folder)
            self._exit_status = _run_program(arguments)
            return
        for descriptor in standard:
            os.close(descriptor)
        self._running[pid] = socket.socket(fileno=control)
        self._report(pid, pid)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._report(pid, os.waitstatus_to_exitcode(status))
            self._running.pop(pid).close()

    def _report(self, pid: int, number: int) -> None:
        with contextlib.suppress(OSError):  # nobody is there to read it
            self._running[pid].sendall(b"%d\n" % number)

    def _become_program(self, environment: dict[str, str], standard: Sequence[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for theirs in (self._requests, self._woken, self._wake, *self._running.values()):
            theirs.close()
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)


def _run_program(arguments: Sequence[str]) -> int:
    """Do what ``python ARGUMENTS`` does; return the exit status."""
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exc:
        if isinstance(exc.code, str):
            sys.stderr.write(f"{exc.code}\n")
        return exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    forker = Forker(socket.socket(fileno=int(sys.argv[1])))
    atexit.register(forker.end_child)  # before what is imported registers anything, so that it comes last
    for name in sys.argv[2:] or PRELOADED:
        importlib.import_module(name)
    for name in () if sys.argv[2:] else PRELOADED_EXTRAS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # what the collector never touches stays shared
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    forker.run()
