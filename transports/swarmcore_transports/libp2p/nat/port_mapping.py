"""Listening ports that the router of a LAN lets in from outside, when it is asked over UPnP."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, TypeVarTuple

import miniupnpc
from multiaddr import Multiaddr

from swarmcore.tasks import cancel_and_wait, wait_until_set
from swarmcore_transports.libp2p.multiaddrs import host_of, port_of, reach, tcp_multiaddr

_DISCOVERY_MILLISECONDS = 1000
_DESCRIPTION = "swarmcore"


class RouterError(Exception):
    """The router does not do what it was asked for."""


class PortTakenError(RouterError):
    """The router maps that port for somebody else."""


class UpnpRouter:
    """The router of this LAN; `find` it."""

    lan_host: str
    """This machine's IP address as the router knows it."""
    external_host: str
    """The router's address on its other side; empty when it has none."""

    def __init__(self, client: miniupnpc.UPnP) -> None:
        self._client = client
        self._lock = threading.Lock()
        self.lan_host = client.lanaddr
        self.external_host = client.externalipaddress() or ""

    @classmethod
    def find(cls) -> UpnpRouter | None:
        """The router that answers within a second, or None."""
        client = miniupnpc.UPnP()
        client.discoverdelay = _DISCOVERY_MILLISECONDS
        try:
            if not client.discover():
                return None
            client.selectigd()
            return cls(client)
        except Exception:  # the library raises nothing more specific, also when nobody has answered
            return None

    def map(self, external: int, port: int, seconds: int) -> None:
        """Let TCP port ``external`` lead to ``port`` here for ``seconds``, or renew that.

        A router that knows only mappings for ever makes one. Raise `PortTakenError` when the port leads
        elsewhere, else `RouterError`.
        """
        with self._lock:
            try:
                there = self._client.getspecificportmapping(external, "TCP")
                if there and (there[0], int(there[1])) != (self.lan_host, port):
                    raise PortTakenError(f"port {external} leads to {there[0]}:{there[1]}")
                try:
                    self._map(external, port, seconds)
                except Exception as exc:
                    if "OnlyPermanentLeasesSupported" not in str(exc):
                        raise
                    self._map(external, port, 0)
            except RouterError:
                raise
            except Exception as exc:
                kind = PortTakenError if "ConflictInMappingEntry" in str(exc) else RouterError
                raise kind(f"mapping port {external}: {exc}") from exc

    def _map(self, external: int, port: int, seconds: int) -> None:
        if not self._client.addportmapping(external, "TCP", self.lan_host, port, _DESCRIPTION, "", seconds):
            raise RouterError("it refuses")

    def unmap(self, external: int) -> None:
        """Undo `map`. Raise `RouterError` when that fails."""
        with self._lock:
            try:
                self._client.deleteportmapping(external, "TCP")
            except Exception as exc:
                raise RouterError(f"unmapping port {external}: {exc}") from exc


logger = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LEASE_SECONDS = 3600
RENEWAL_SECONDS = LEASE_SECONDS / 3

_RETRY_SECONDS = 600.0
"""Between looking for a router, or for one that works, and looking again."""

_CALL_SECONDS = 10.0
_CLOSE_SECONDS = 3.0
_OTHER_PORTS = 4
_FIRST_OTHER_PORT, _LAST_OTHER_PORT = 20000, 60000


def external_ports(port: int, rng: random.Random) -> Iterator[int]:
    """Which ports to try for ``port``, in turn: the same, then any others."""
    yield port
    for _ in range(_OTHER_PORTS):
        yield rng.randint(_FIRST_OTHER_PORT, _LAST_OTHER_PORT)


class PortMapper:
    """Asks a router over UPnP for the ports of listening addresses, renews that, and undoes it in `close`.

    ``on_mapped`` is called with the public addresses that came of it, whenever they change. Without a router
    that answers, or without a listening address on a LAN, nothing happens. Lives in asyncio.
    """

    def __init__(self, on_mapped: Callable[[list[Multiaddr]], None], rng: random.Random) -> None:
        self._on_mapped = on_mapped
        self._rng = rng
        self._listening: list[Multiaddr] = []
        self._changed = asyncio.Event()
        self._router: UpnpRouter | None = None
        self._external: dict[int, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.refusal = ""
        """Why the router lets nobody in; empty while it does, or before it was asked."""

    def __repr__(self) -> str:
        return (
            f"<PortMapper {', '.join(f'{out} → {port}' for port, out in self._external.items()) or 'idle'}>"
        )

    def update_listening(self, listening: Sequence[Multiaddr]) -> None:
        """Where this peer listens from now on."""
        lan = [a for a in listening if reach(a) == "lan" and ":" not in host_of(a)]
        if lan == self._listening:
            return
        self._listening = lan
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="port mapping")

    async def close(self) -> None:
        """Have the router forget the ports, within seconds. Harmless when repeated."""
        if self._task is None:
            return
        await cancel_and_wait(self._task)
        router, external, self._external = self._router, list(self._external.values()), {}
        if router is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                for port in external:
                    try:
                        await asyncio.to_thread(router.unmap, port)
                    except RouterError as exc:
                        logger.debug("%s", exc)
        except TimeoutError:
            logger.debug("the router does not answer; its ports stay mapped until the lease ends")

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            wait = _RETRY_SECONDS
            try:
                if self._router and self._router.lan_host not in map(host_of, self._listening):
                    # Another network: what that router keeps for this machine ends with its lease.
                    self._router, self._external = None, {}
                    self._on_mapped([])
                if self._listening:
                    self._router = self._router or await _in_thread(UpnpRouter.find)
                if self._router:
                    self.refusal = ""
                    self._on_mapped(await self._map_all(self._router))
                    wait = RENEWAL_SECONDS
            except (RouterError, TimeoutError) as exc:
                self.refusal = f"the router maps no port: {str(exc) or 'it does not answer'}"
                logger.info("%s", self.refusal)
                self._router = None
                self._on_mapped([])
            except Exception:
                logger.exception("port mapping failed")
                return
            await wait_until_set(self._changed, wait)

    async def _map_all(self, router: UpnpRouter) -> list[Multiaddr]:
        """The addresses outside of all ports that listen where ``router`` sees this machine."""
        ports = {port_of(address) for address in self._listening if host_of(address) == router.lan_host}
        for port in self._external.keys() - ports:
            await _in_thread(router.unmap, self._external.pop(port))
        for port in sorted(ports):
            before = self._external.get(port)
            await self._map(router, port)
            if self._external[port] != before:
                logger.info("the router maps %s port %d", router.external_host, self._external[port])
        if ports and not router.external_host:
            raise RouterError("it has no address outside")
        outside = [tcp_multiaddr(router.external_host, port) for port in self._external.values()]
        public = [address for address in outside if reach(address) == "public"]
        if len(public) < len(outside):
            self.refusal = f"the router is behind another one: {router.external_host} is not a public address"
            logger.info("%s", self.refusal)
        return public

    async def _map(self, router: UpnpRouter, port: int) -> None:
        """Raise `RouterError` when no external port is to be had."""
        refusal = ""
        for external in external_ports(self._external.get(port, port), self._rng):
            self._external[port] = external  # before it is so: `close` undoes it also when this is cancelled
            try:
                await _in_thread(router.map, external, port, LEASE_SECONDS)
                return
            except PortTakenError as exc:
                refusal = str(exc)
                del self._external[port]
        raise RouterError(refusal)


async def _in_thread(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    async with asyncio.timeout(_CALL_SECONDS):
        return await asyncio.to_thread(function, *arguments)
