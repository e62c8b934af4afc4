"""The process of a `ForkServer`: imports what servers need, then forks one for each request.

``python -m swarmcore.testing.fork_server_process FD``, where FD is a Unix socket. A request is one byte on it
with three descriptors: a server's control socket, its stdout and its stderr. From the control socket come the
command's arguments, a line of JSON; the pid is written to it, then it is the server's stdin, and once the
server has ended, the exit status is written to it, negative for a signal.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

PRELOADED = (
    "swarmcore.cli",
    "swarmcore.serving",
    "swarmcore.executor.torch.executor",
    "swarmcore_transports.tcp",
    "transformers.models.llama.modeling_llama",
)
"""Importing these starts no thread, no event loop and no CUDA: none of that would survive a fork."""

PRELOADED_EXTRAS = ("swarmcore_transports.libp2p", "swarmcore_transports.webrtc")
"""Likewise, where what they need is installed."""


class Forker:
    """Forks servers, and reports how they ended. Everything is done in one thread, one thing at a time."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._running: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Fork until the requests end. Servers that still run then end with their stdin."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake.fileno())
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(4096)
                self._reap()
            if self._requests in ready:
                request, descriptors, _, _ = socket.recv_fds(self._requests, 1, 3)
                if not request:
                    return
                self._fork(*descriptors)

    def _fork(self, control: int, stdout: int, stderr: int) -> None:
        with open(control, "rb", closefd=False) as lines:
            arguments = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            os._exit(self._serve(arguments, control, stdout, stderr))
        os.close(stdout)
        os.close(stderr)
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

    def _serve(self, arguments: Sequence[str], *standard: int) -> int:
        """In the child: be ``swarmcore ARGUMENTS``. Return the exit status."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            for theirs in (self._requests, self._woken, self._wake, *self._running.values()):
                theirs.close()
            for number, descriptor in enumerate(standard):
                os.dup2(descriptor, number)
                os.close(descriptor)

            from swarmcore.cli import main

            main(arguments, prog_name="swarmcore")
        except SystemExit as exc:
            return exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    for name in PRELOADED_EXTRAS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # what the collector never touches stays shared
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    Forker(socket.socket(fileno=int(sys.argv[1]))).run()
