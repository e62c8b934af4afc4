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
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import attrs

from swarmcore.bench.namespaces import Network, built, command, ip, join, why_not
from swarmcore.errors import UnavailableError

Host = Literal["a", "b", "public"]
Kind = Literal["cone", "symmetric"]

ADDRESSES: dict[Host, str] = {"a": "10.1.0.2", "b": "10.2.0.2", "public": "11.0.0.1"}
ROUTERS: dict[Host, str] = {"a": "11.0.0.2", "b": "11.0.0.3"}
NOBODY = "11.0.0.254"
PROGRAMS = {"ip": "iproute2", "nft": "nftables"}
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


def unavailable(*, upnp: bool = False) -> str | None:
    """Why no lab, or no lab whose routers map ports, can be built here, or None."""
    return why_not(PROGRAMS | ({"miniupnpd": "miniupnpd"} if upnp else {}))


@attrs.define
class NatLab(Network):
    """A built network. `address` is what a host calls itself, `seen_as` what the public host sees of it.

    `folder` is for files of the programs in it.
    """

    folder: Path = attrs.field(kw_only=True)

    def address(self, host: Host) -> str:
        return ADDRESSES[host]

    def seen_as(self, host: Host) -> str:
        return ROUTERS.get(host, ADDRESSES[host])

    async def run(self, host: Host, argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
        """Start a process on `host`, as `asyncio.create_subprocess_exec` does. It ends with the lab."""
        return await self.start(self.namespace(host), argv, **options)

    def move(self, home: Host, address: str) -> None:
        """Give `home` another address in its LAN, as if it had joined another one: the old one is gone."""
        inside = self.namespace(home)
        gateway = ADDRESSES[home].rpartition(".")[0] + ".1"
        ip(inside, ["addr flush dev wan", f"addr add {address}/24 dev wan"])
        ip(inside, [f"route add default via {gateway}"])

    async def map_ports(self, home: Host) -> None:
        """Let the router of `home` map ports when asked over UPnP: run miniupnpd in it."""
        router = self.namespace(f"router-{home}")
        command("ip", "netns", "exec", router, "nft", "-f", "-", stdin=PORT_MAPPING_RULES)
        pid_file = str(self.folder / f"{router}.pid")
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
        daemon = await self.start(router, argv, stderr=asyncio.subprocess.PIPE)
        assert daemon.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while line := await daemon.stderr.readline():
                if b"HTTP listening" in line:
                    self.watching.append(asyncio.create_task(daemon.stderr.read()))
                    return
        raise UnavailableError("miniupnpd ended instead of listening")


@asynccontextmanager
async def nat_lab(kind_a: Kind = "cone", kind_b: Kind = "cone") -> AsyncIterator[NatLab]:
    """Build the network, and remove it with every process in it on the way out; see `built`."""
    if reason := unavailable():
        raise UnavailableError(reason)
    with tempfile.TemporaryDirectory() as folder:
        lab = NatLab(folder=Path(folder))
        async with built(lab, lambda: _build(lab, {"a": kind_a, "b": kind_b})):
            yield lab


def _build(lab: NatLab, kinds: dict[Host, Kind]) -> None:
    switch, public = lab.namespace("switch"), lab.namespace("public")
    names = ("switch", "public", "router-a", "router-b", "a", "b")
    ip("", [f"netns add {lab.namespace(name)}" for name in names])
    ip(switch, ["link add bridge type bridge", "link set bridge up"])
    for name in ("public", "router-a", "router-b"):
        join(lab.namespace(name), "wan", switch, f"to-{name}")
        ip(switch, [f"link set to-{name} master bridge up"])
    ip(public, _on_the_internet(ADDRESSES["public"]))
    for home, kind in kinds.items():
        inside, router = lab.namespace(home), lab.namespace(f"router-{home}")
        gateway = ADDRESSES[home].rpartition(".")[0] + ".1"
        join(router, "lan", inside, "wan")
        ip(router, [*_on_the_internet(ROUTERS[home]), f"addr add {gateway}/24 dev lan", "link set lan up"])
        ip(inside, [f"addr add {ADDRESSES[home]}/24 dev wan", "link set lo up", "link set wan up"])
        ip(inside, [f"route add default via {gateway}"])
        command("ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        command("ip", "netns", "exec", router, "nft", "-f", "-", stdin=_router_rules(kind))


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
