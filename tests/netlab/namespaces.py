"""Network namespaces on one machine: made for a test, removed with every process in them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs

PROGRAMS = {"ip": "iproute2"}
PREFIX = "netlab"
PATIENCE = 10.0


class LabError(Exception):
    """A command that builds the network failed; the message has its output."""


def why_not(programs: Mapping[str, str] = PROGRAMS) -> str | None:
    """Why no lab that takes ``programs``, each of a Debian package, can be built here, or None."""
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
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        command("ip", "netns", "add", name)
        command("ip", "netns", "del", name)
    except LabError as error:
        return f"root may not make network namespaces here ({error})"
    return None


@attrs.define
class Lab:
    """Namespaces whose names begin with `run_id`, and the processes in them."""

    run_id: str = attrs.field(factory=lambda: f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}")
    processes: list[asyncio.subprocess.Process] = attrs.field(factory=list)
    watching: list[asyncio.Task[bytes]] = attrs.field(factory=list)

    def namespace(self, name: str) -> str:
        return f"{self.run_id}-{name}"

    async def start(self, namespace: str, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", namespace, *argv, start_new_session=True, **options
        )
        self.processes.append(process)
        return process

    def kill_processes(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


L = TypeVar("L", bound=Lab)


@asynccontextmanager
async def built(lab: L, build: Callable[[], None]) -> AsyncIterator[L]:
    """Build the network, and remove it with every process in it on the way out, whatever happened inside.

    Building takes about a tenth of a second, and blocks: a cancelled test leaves nothing half made.
    """
    _remove_leftovers()
    try:
        build()
        yield lab
    finally:
        lab.kill_processes()
        _remove(lab.run_id)
        await asyncio.gather(*lab.watching, *(process.wait() for process in lab.processes))


def link(here: str, device: str, there: str, its_device: str) -> None:
    ip("", [f"link add {device} netns {here} type veth peer name {its_device} netns {there}"])


def _remove_leftovers() -> None:
    """Remove the networks of test runs that were killed: the process named in their names is gone."""
    for run_id in {"-".join(name.split("-")[:3]) for name in _namespaces()}:
        if not Path("/proc", run_id.split("-")[1]).exists():
            _remove(run_id)


def _remove(run_id: str) -> None:
    for name in _namespaces():
        if name.startswith(f"{run_id}-"):
            for pid in command("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            command("ip", "netns", "del", name)
            Path(tempfile.gettempdir(), f"{name}.pid").unlink(missing_ok=True)


def _namespaces() -> list[str]:
    listed = [line.split()[0] for line in command("ip", "netns", "list").splitlines()]
    return [name for name in listed if name.startswith(f"{PREFIX}-")]


def ip(namespace: str, commands: list[str]) -> None:
    where = ["-n", namespace] if namespace else []
    command("ip", *where, "-batch", "-", stdin="\n".join(commands))


def command(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
