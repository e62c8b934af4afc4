"""How much of the machine remote peers may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import attrs

if sys.platform != "win32":
    import resource

_MIB = 2**20

CONNECTION_BYTES = 640 * 1024
"""Memory of one TLS connection, most of it asyncio's and OpenSSL's buffers."""


@attrs.frozen
class Bounds:
    """The most of one resource that may be in use at a time, by scope."""

    system: int
    """All peers together."""
    peer: int
    """One peer that has proven its id."""
    unproven: int
    """All together that have not proven an id yet."""
    protocol: int
    """One protocol or method, for all peers together."""


@attrs.frozen
class Machine:
    """What there is to divide."""

    descriptors: int
    """File descriptors that this process may still open."""
    memory: int
    """Bytes that this process may still take."""

    @classmethod
    def here(cls) -> Machine:
        """This process now: its limits and what it uses already."""
        return cls(max(0, descriptor_limit() - open_descriptors()), free_memory())


@attrs.frozen
class ResourceLimits:
    """Bounds on everything that a `ResourceManager` counts."""

    bytes: Bounds
    streams: Bounds
    connections: Bounds
    descriptors: Bounds
    dials: Bounds

    @classmethod
    def of(cls, machine: Machine, *, streams: int = 4096, of_peer: int = 256) -> ResourceLimits:
        """Bounds that leave ``machine`` room for its own work.

        An eighth of the memory, between 384 MiB and 4 GiB, is for what remote peers send; one peer gets
        256 MiB of that, room for a few of the largest messages. Another eighth is for connections, each of
        which takes `CONNECTION_BYTES`; and a quarter of the descriptors, 256 at most, stays for files and
        dials of our own. One peer gets half of the connections at most, as do all together that are not
        proven. There are ``streams`` at most where the memory is enough for them, ``of_peer`` of
        one peer.
        """
        held = min(max(machine.memory // 8, 384 * _MIB), 4096 * _MIB)
        sockets = max(machine.descriptors - min(machine.descriptors // 4, 256), 32)
        sockets = min(sockets, max(machine.memory // 8 // CONNECTION_BYTES, 256))
        # Every stream has a first window, whatever else is held: all of them leave room for long messages.
        streams = min(streams, held // 3 // (128 * 1024))
        of_peer = min(of_peer, streams)
        return cls(
            bytes=Bounds(held, 256 * _MIB, held // 8, held),
            streams=Bounds(streams, of_peer, of_peer, streams),
            connections=Bounds(2 * streams, 2 * of_peer, of_peer, 2 * streams),
            descriptors=Bounds(sockets, min(sockets // 2, 512), min(sockets // 2, 512), sockets),
            dials=Bounds(256, 16, 16, 256),
        )


def raise_descriptor_limit(most: int = 65_536) -> int:
    """Raise this process's soft limit of open files to the hard one, up to ``most``; return what it is then.

    For programs, at their start: a library leaves the limits of its process alone.
    """
    if sys.platform == "win32":
        return descriptor_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # some systems allow less than they say
            return soft
    return descriptor_limit()


def descriptor_limit() -> int:
    """How many files this process may have open."""
    if sys.platform == "win32":
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def open_descriptors() -> int:
    """How many files this process has open; a guess where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a list is all that is wanted
    except OSError:
        return 64


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, of its container and of its own limits."""
    return max(0, min(_of_machine(), _of_container(), _of_process()))


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # unlike what is free, it counts the page cache
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**33


def _of_container() -> int:
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63


def _of_process() -> int:
    if sys.platform == "win32":
        return 2**63
    room = 2**63
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            room = min(room, soft - _status(used))
    return room


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
