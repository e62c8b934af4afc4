"""Two hosts far from each other on one machine: network namespaces, joined by an emulated link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import Any

import attrs

from swarmcore.bench.link_pump import LEFT, RIGHT, Carried
from swarmcore.bench.namespaces import Network, built, ip, why_not
from swarmcore.errors import InputError, UnavailableError

CONGESTION_CONTROL = "cubic"
"""Of the hosts' TCP: Linux' default, whatever this machine's is."""

_HUB = "hub"
_PATIENCE = 10.0
_BYTES_OF_A_MEGABIT = 125_000
_MTU = 1500

# Of the block that RFC 2544 sets aside for measuring networks.
_NET = "198.18.0.0/30"
_ADDRESSES = {LEFT: "198.18.0.1", RIGHT: "198.18.0.2"}


@attrs.frozen
class Link:
    """What a link is like, the same in both directions."""

    delay: float = 0.0
    """Milliseconds one way."""
    loss: float = 0.0
    """Percent of the packets each way that vanish by chance."""
    rate: float | None = None
    """Megabits per second each way; None is without a limit, as far as the emulator keeps up."""
    seed: int = 0
    """Of the chance that packets are lost by."""

    def __attrs_post_init__(self) -> None:
        if self.delay < 0:
            raise InputError(f"a delay of {self.delay:g} ms is below 0")
        if not 0 <= self.loss <= 50:
            raise InputError(f"a loss of {self.loss:g} % is not from 0 to 50")
        if self.rate is not None and self.rate <= 0:
            raise InputError(f"a rate of {self.rate:g} Mbit/s is not above 0")

    def __str__(self) -> str:
        parts = [f"{self.delay:g} ms one way"]
        parts += [f"{self.loss:g} % lost"] if self.loss else []
        parts += [f"{self.rate:g} Mbit/s"] if self.rate is not None else []
        return ", ".join(parts)


@attrs.define
class LongLink(Network):
    """Two hosts, `LEFT` and `RIGHT`, and the link between them."""

    carried: Carried | None = None
    """What the link did, once it is gone and ended in good order."""

    def address(self, host: str) -> str:
        """The IPv4 address of a host, the only one it has but loopback."""
        return _ADDRESSES[host]

    async def run(self, host: str, *argv: str, **options: Any) -> asyncio.subprocess.Process:
        """Start this Python on a host, with pipes for stdin and stdout."""
        argv = (sys.executable, *argv)
        return await self.start(self.namespace(host), argv, stdin=PIPE, stdout=PIPE, **options)


@contextlib.asynccontextmanager
async def long_link(link: Link) -> AsyncIterator[LongLink]:
    """Two hosts joined by ``link``. On the way out they and every process on them are gone.

    Raise `UnavailableError` where no such thing can be made: it takes Linux, root and iproute2.
    """
    if reason := why_not():
        raise UnavailableError(
            f"no link can be emulated here: {reason}; without --delay, --loss and --rate loopback is measured"
        )
    network = LongLink()
    async with built(network, lambda: _make_namespaces(network)), _pump(network, link):
        yield network


def _make_namespaces(network: LongLink) -> None:
    ip("", [f"netns add {network.namespace(name)}" for name in (_HUB, LEFT, RIGHT)])


@contextlib.asynccontextmanager
async def _pump(network: LongLink, link: Link) -> AsyncIterator[None]:
    rate = float("inf") if link.rate is None else link.rate * _BYTES_OF_A_MEGABIT
    settings = (str(link.delay / 1e3), str(link.loss / 100), str(rate), str(link.seed))
    pump = await network.run(_HUB, "-m", "swarmcore.bench.link_pump", *settings)
    assert pump.stdin and pump.stdout
    if not await asyncio.wait_for(pump.stdout.readline(), _PATIENCE):
        raise UnavailableError(
            "the emulated link ended at once; its message is above (it needs /dev/net/tun)"
        )
    # The devices begin in the hub's namespace and go from there: nothing ever shows in the machine's own.
    hub = network.namespace(_HUB)
    ip(hub, [f"link set {host} netns {network.namespace(host)}" for host in (LEFT, RIGHT)])
    for host in (LEFT, RIGHT):
        # No link-local IPv6 address: it would be one more path between the hosts to choose from.
        device = f"dev {host} addrgenmode none mtu {_MTU} txqueuelen 1000 up"
        # By the route: a namespace may not choose every algorithm as its default.
        route = f"{_NET} dev {host} congctl {CONGESTION_CONTROL}"
        ip(
            network.namespace(host),
            [
                "link set lo up",
                f"addr add {_ADDRESSES[host]}/30 dev {host} noprefixroute",
                f"link set {device}",
                f"route add {route}",
                f"route add 224.0.0.0/4 dev {host}",  # libraries that look for neighbours complain of none
            ],
        )
    yield
    pump.stdin.close()
    line = await asyncio.wait_for(pump.stdout.readline(), _PATIENCE)
    network.carried = Carried(**json.loads(line)) if line else None
