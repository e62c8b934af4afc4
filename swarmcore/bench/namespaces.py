"""Network namespaces on one machine: made for one purpose, removed with every process in them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs

from swarmcore.errors import UnavailableError

PROGRAMS = {"ip": "iproute2"}
"""Programs that namespaces need, each with its Debian package."""

_PREFIX = "swarmcore"
_NAME = re.compile(rf"({_PREFIX}-(\d+)-[0-9a-f]{{6}})-[\w-]+")  # the run, its process
_PATIENCE = 10.0


def why_not(programs: Mapping[str, str] = PROGRAMS) -> str | None:
    """Why no network that takes ``programs``, each of a Debian package, can be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [
        f"{program} (Debian package {package})"
        for program, package in programs.items()
        if shutil.which(program) is None
    ]
    if missing:
        return f"missing: {', '.join(missing)}"
    return _forbidden()


@functools.cache
def _forbidden() -> str | None:
    """Root in a container often may not make namespaces: try it."""
    name = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        command("ip", "netns", "add", name)
        command("ip", "netns", "del", name)
    except UnavailableError as error:
        return f"root may not make network namespaces here ({error})"
    return None


@attrs.define
class Network:
    """Namespaces whose names begin with `run_id`, and the processes in them."""

    run_id: str = attrs.field(factory=lambda: f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}")
    processes: list[asyncio.subprocess.Process] = attrs.field(factory=list)
    watching: list[asyncio.Task[bytes]] = attrs.field(factory=list)

    def namespace(self, name: str) -> str:
        """The whole name of the namespace ``name``."""
        return f"{self.run_id}-{name}"

    def within(self, namespace: str) -> tuple[str, ...]:
        """What goes before a command that is to run in ``namespace``."""
        return ("ip", "netns", "exec", namespace)

    async def start(self, namespace: str, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
        """Start a process in ``namespace``, as `asyncio.create_subprocess_exec` does; Ctrl-C passes it by.

        It is killed with the network.
        """
        process = await asyncio.create_subprocess_exec(
            *self.within(namespace), *argv, start_new_session=True, **options
        )
        self.processes.append(process)
        return process

    def kill_processes(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


N = TypeVar("N", bound=Network)


@asynccontextmanager
async def built(network: N, build: Callable[[], None]) -> AsyncIterator[N]:
    """Build ``network``, and remove it with every process in it on the way out, whatever happened inside.

    Building takes about a tenth of a second, and blocks: who is cancelled leaves nothing half made.
    """
    _remove_leftovers()
    try:
        build()
        yield network
    finally:
        network.kill_processes()
        _remove(network.run_id)
        await asyncio.gather(*network.watching, *(process.wait() for process in network.processes))


def join(here: str, device: str, there: str, its_device: str) -> None:
    """Put the two ends of a wire into two namespaces."""
    ip("", [f"link add {device} netns {here} type veth peer name {its_device} netns {there}"])


def ip(namespace: str, commands: list[str]) -> None:
    """Run commands of ``ip`` in ``namespace``, in this one for ``""``. Raise `UnavailableError`."""
    where = ["-n", namespace] if namespace else []
    command("ip", *where, "-batch", "-", stdin="\n".join(commands))


def command(*argv: str, stdin: str = "") -> str:
    """What a program prints. Raise `UnavailableError`, with what it says, when it fails."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _remove_leftovers() -> None:
    """Remove the networks of runs that were killed: the process named in their names is gone."""
    for run_id, process in {(found[1], found[2]) for found in _namespaces()}:
        if not Path("/proc", process).exists():
            with contextlib.suppress(UnavailableError):  # somebody else does so at this moment
                _remove(run_id)


def _remove(run_id: str) -> None:
    for found in _namespaces():
        if found[1] == run_id:
            for pid in command("ip", "netns", "pids", found.string).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            command("ip", "netns", "del", found.string)


def _namespaces() -> list[re.Match[str]]:
    listed = [line.split()[0] for line in command("ip", "netns", "list").splitlines()]
    return [found for name in listed if (found := _NAME.fullmatch(name))]
