"""Two homes behind routers and a public host, built from network namespaces on one machine.

    a 10.1.0.2 ── router 11.0.0.2 ┐
                                  ├── switch ── public 11.0.0.1
    b 10.2.0.2 ── router 11.0.0.3 ┘

Both routers drop what their home did not ask for. A `cone` router keeps the home's port for every
destination, so that a hole can be punched; a `symmetric` one takes a random port for each destination,
so that none can. As on the Internet, what is sent to an address that nobody has (the private address of
the other home) vanishes without an answer. 11.0.0.0/24, unlike the ranges for documentation, passes for
public in Python's `ipaddress`, so the code under test takes it for what it plays here.
"""

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
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import attrs

Host = Literal["a", "b", "public"]
Kind = Literal["cone", "symmetric"]

ADDRESSES: dict[Host, str] = {"a": "10.1.0.2", "b": "10.2.0.2", "public": "11.0.0.1"}
ROUTERS: dict[Host, str] = {"a": "11.0.0.2", "b": "11.0.0.3"}
NOBODY = "11.0.0.254"
PROGRAMS = {"ip": "iproute2", "nft": "nftables"}
PREFIX = "netlab"
PATIENCE = 10.0

# The chains that miniupnpd fills, and what lets through what they redirect.
PORT_MAPPING_RULES = """
    insert rule ip home to_home ct status dnat accept
    table inet filter {
        chain miniupnpd { }
        chain prerouting_miniupnpd { }
        chain postrouting_miniupnpd { }
        chain forward { type filter hook forward priority 0; jump miniupnpd; }
        chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
        chain postrouting { type nat hook postrouting priority 99; jump postrouting_miniupnpd; }
    }
"""


class LabError(Exception):
    """A command that builds the network failed; the message has its output."""


def unavailable(*, upnp: bool = False) -> str | None:
    """Why no lab, or no lab whose routers map ports, can be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = PROGRAMS | ({"miniupnpd": "miniupnpd"} if upnp else {})
    missing = [
        f"{program} (Debian package {package})"
        for program, package in needed.items()
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
        _command("ip", "netns", "add", name)
        _command("ip", "netns", "del", name)
    except LabError as error:
        return f"root may not make network namespaces here ({error})"
    return None


@attrs.define
class NatLab:
    """A built network. `address` is what a host calls itself, `seen_as` what the public host sees of it."""

    run_id: str
    processes: list[asyncio.subprocess.Process] = attrs.field(factory=list)
    watching: list[asyncio.Task[bytes]] = attrs.field(factory=list)

    def address(self, host: Host) -> str:
        return ADDRESSES[host]

    def seen_as(self, host: Host) -> str:
        return ROUTERS.get(host, ADDRESSES[host])

    def namespace(self, name: str) -> str:
        return f"{self.run_id}-{name}"

    async def run(self, host: Host, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
        """Start a process on `host`, as `asyncio.create_subprocess_exec` does. It ends with the lab."""
        return await self._start(self.namespace(host), argv, **options)

    async def map_ports(self, home: Host) -> None:
        """Let the router of `home` map ports when asked over UPnP: run miniupnpd in it."""
        router = self.namespace(f"router-{home}")
        _command("ip", "netns", "exec", router, "nft", "-f", "-", stdin=PORT_MAPPING_RULES)
        pid_file = str(Path(tempfile.gettempdir(), f"{router}.pid"))
        interfaces = ["-i", "wan", "-a", "lan", "-p", "5000"]
        allowed = ["-S", "-A", "allow 1024-65535 0.0.0.0/0 1024-65535"]
        argv = [
            "miniupnpd",
            "-d",
            "-f",
            "/dev/null",
            "-P",
            pid_file,
            "-u",
            str(uuid.uuid4()),
            *interfaces,
            *allowed,
        ]
        daemon = await self._start(router, argv, stderr=asyncio.subprocess.PIPE)
        assert daemon.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while line := await daemon.stderr.readline():
                if b"HTTP listening" in line:
                    self.watching.append(asyncio.create_task(daemon.stderr.read()))
                    return
        raise LabError("miniupnpd ended instead of listening")

    async def _start(self, namespace: str, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
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


@asynccontextmanager
async def nat_lab(kind_a: Kind = "cone", kind_b: Kind = "cone") -> AsyncIterator[NatLab]:
    """Build the network, and remove it with every process in it on the way out, whatever happened inside.

    Building takes about a tenth of a second, and blocks: a cancelled test leaves nothing half made.
    """
    if reason := unavailable():
        raise LabError(reason)
    _remove_leftovers()
    lab = NatLab(f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        _build(lab, {"a": kind_a, "b": kind_b})
        yield lab
    finally:
        lab.kill_processes()
        _remove(lab.run_id)
        await asyncio.gather(*lab.watching, *(process.wait() for process in lab.processes))


def _build(lab: NatLab, kinds: dict[Host, Kind]) -> None:
    switch, public = lab.namespace("switch"), lab.namespace("public")
    names = ("switch", "public", "router-a", "router-b", "a", "b")
    _ip("", [f"netns add {lab.namespace(name)}" for name in names])
    _ip(switch, ["link add bridge type bridge", "link set bridge up"])
    for name in ("public", "router-a", "router-b"):
        _link(lab.namespace(name), "wan", switch, f"to-{name}")
        _ip(switch, [f"link set to-{name} master bridge up"])
    _ip(public, _on_the_internet(ADDRESSES["public"]))
    for home, kind in kinds.items():
        inside, router = lab.namespace(home), lab.namespace(f"router-{home}")
        gateway = ADDRESSES[home].rpartition(".")[0] + ".1"
        _link(router, "lan", inside, "wan")
        _ip(router, [*_on_the_internet(ROUTERS[home]), f"addr add {gateway}/24 dev lan", "link set lan up"])
        _ip(inside, [f"addr add {ADDRESSES[home]}/24 dev wan", "link set lo up", "link set wan up"])
        _ip(inside, [f"route add default via {gateway}"])
        _command("ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        _command("ip", "netns", "exec", router, "nft", "-f", "-", stdin=_router_rules(kind))


def _link(here: str, device: str, there: str, its_device: str) -> None:
    _ip("", [f"link add {device} netns {here} type veth peer name {its_device} netns {there}"])


def _on_the_internet(address: str) -> list[str]:
    return [
        f"addr add {address}/24 dev wan",
        "link set lo up",
        "link set wan up",
        f"neigh add {NOBODY} lladdr 02:00:00:00:00:fe dev wan",
        f"route add default via {NOBODY}",
    ]


def _router_rules(kind: Kind) -> str:
    ports = "fully-random" if kind == "symmetric" else ""
    answers_only = 'iifname "wan" ct state established,related accept; iifname "wan" drop;'
    return f"""
        table ip home {{
            chain out {{ type nat hook postrouting priority 100; oifname "wan" masquerade {ports}; }}
            chain to_router {{ type filter hook input priority 0; {answers_only} }}
            chain to_home {{ type filter hook forward priority 0; {answers_only} }}
        }}
    """


def _remove_leftovers() -> None:
    """Remove the networks of test runs that were killed: the process named in their names is gone."""
    for run_id in {"-".join(name.split("-")[:3]) for name in _namespaces()}:
        if not Path("/proc", run_id.split("-")[1]).exists():
            _remove(run_id)


def _remove(run_id: str) -> None:
    for name in _namespaces():
        if name.startswith(f"{run_id}-"):
            for pid in _command("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _command("ip", "netns", "del", name)
            Path(tempfile.gettempdir(), f"{name}.pid").unlink(missing_ok=True)


def _namespaces() -> list[str]:
    listed = [line.split()[0] for line in _command("ip", "netns", "list").splitlines()]
    return [name for name in listed if name.startswith(f"{PREFIX}-")]


def _ip(namespace: str, commands: list[str]) -> None:
    where = ["-n", namespace] if namespace else []
    _command("ip", *where, "-batch", "-", stdin="\n".join(commands))


def _command(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
