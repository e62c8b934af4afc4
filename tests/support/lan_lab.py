"""A local network: some hosts on one switch, which has multicast and no way out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs

from swarmcore.bench.namespaces import Network, built, ip, join, why_not
from swarmcore.errors import UnavailableError


@attrs.define
class Lan(Network):
    """A built network. Hosts are numbered from 0."""

    def address(self, host: int) -> str:
        return f"10.3.0.{host + 1}"

    async def run(self, host: int, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
        """Start a process on `host`, as `asyncio.create_subprocess_exec` does. It ends with the lab."""
        return await self.start(self.namespace(str(host)), argv, **options)


@asynccontextmanager
async def lan(hosts: int) -> AsyncIterator[Lan]:
    """Build the network, and remove it with every process in it on the way out; see `built`."""
    if reason := why_not():
        raise UnavailableError(reason)
    lab = Lan()
    async with built(lab, lambda: _build(lab, hosts)):
        yield lab


def _build(lab: Lan, hosts: int) -> None:
    switch = lab.namespace("switch")
    ip("", [f"netns add {lab.namespace(name)}" for name in ("switch", *map(str, range(hosts)))])
    # Without snooping the bridge floods multicast from the first packet on.
    ip(switch, ["link add bridge type bridge mcast_snooping 0", "link set bridge up"])
    for host in range(hosts):
        inside = lab.namespace(str(host))
        join(inside, "lan", switch, f"to-{host}")
        ip(switch, [f"link set to-{host} master bridge up"])
        ip(inside, [f"addr add {lab.address(host)}/24 dev lan", "link set lo up", "link set lan up"])
