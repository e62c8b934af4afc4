"""Peers on the local network, found by libp2p's mDNS: ``_p2p._udp.local``, addresses in TXT records."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence

from multiaddr import Multiaddr
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from swarmcore.errors import AddressError, UnavailableError
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import Address, PeerId, short
from swarmcore_transports.libp2p.multiaddrs import (
    is_relayed,
    parse_multiaddr,
    reach,
    to_address,
    to_multiaddr,
)

logger = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
MAX_PEERS = 64
"""Most peers found that are remembered; further ones are ignored until some are gone."""
MAX_ADDRESSES = 16
"""Most addresses of one peer, told or taken."""
MAX_RESOLVING = 16
"""Most instances at a time whose addresses are asked for."""

_KEY = b"dnsaddr="
_LONGEST = 255  # bytes of a string in a TXT record
_ASK_SECONDS = 2.0
_CLOSE_SECONDS = 2.0
_PORT = 4001  # of the SRV record, which nobody reads: the addresses say more

OnFound = Callable[[tuple[Address, ...]], None]


class Mdns:
    """Finds peers over multicast DNS, and tells them of this one if it has addresses, over IPv4.

    ``on_found`` is called with the addresses of a peer when it appears, and when they change. Nothing here is
    proven: who answers there says who it is in the handshake.
    """

    def __init__(self, peer: PeerId, on_found: OnFound) -> None:
        self._peer = peer
        self._on_found = on_found
        self._name = f"{secrets.token_hex(16)}.{SERVICE}"
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._announced: AsyncServiceInfo | None = None
        self._tasks = BackgroundTasks()
        self._lock = asyncio.Lock()
        self._found: dict[str, tuple[Address, ...]] = {}  # by name of the instance
        self._resolving: set[str] = set()

    def __repr__(self) -> str:
        announced = "told of" if self._announced else "not told of"
        return f"<Mdns {short(self._peer)} {announced} · {len(self._found)} found>"

    async def start(self, own: Sequence[Multiaddr]) -> None:
        """Begin to look, and to tell of this peer at ``own`` addresses.

        A peer that is reached on loopback alone stays on loopback. Raise `UnavailableError` where this
        machine does not let us use multicast.
        """
        alone = own and all(reach(address) == "loopback" for address in own)
        try:
            self._zeroconf = AsyncZeroconf(
                interfaces=["127.0.0.1"] if alone else InterfaceChoice.All, ip_version=IPVersion.V4Only
            )
            await self._zeroconf.zeroconf.async_wait_for_start()
            self._browser = AsyncServiceBrowser(
                self._zeroconf.zeroconf, SERVICE, handlers=[self._service_changed]
            )
        except (OSError, ZeroconfError) as exc:
            await self.close()
            raise UnavailableError(
                f"cannot look for peers on the local network: {exc}; give --bootstrap instead of --mdns"
            ) from exc
        self.announce(own)

    def announce(self, own: Iterable[Multiaddr]) -> None:
        """From now on tell others that this peer is at ``own`` addresses; of none, nothing is told."""
        self._tasks.start(self._announce(encode(own, self._peer)), "mDNS announcement")

    async def _announce(self, text: bytes) -> None:
        async with self._lock:
            if self._zeroconf is None or text == (self._announced.text if self._announced else b""):
                return
            info = AsyncServiceInfo(
                SERVICE, self._name, port=_PORT, properties=text, server=f"{self._name[:32]}.local."
            )
            try:
                if not text:
                    assert self._announced
                    sent = await self._zeroconf.async_unregister_service(self._announced)
                elif self._announced:
                    sent = await self._zeroconf.async_update_service(info)
                else:  # the name is random: nobody else has it
                    sent = await self._zeroconf.async_register_service(info, cooperating_responders=True)
                self._announced = info if text else None
                await sent
            except (OSError, ZeroconfError) as exc:
                logger.warning("could not tell the local network of this peer: %s", exc)

    async def close(self) -> None:
        """Say that this peer is gone, and stop. Harmless when repeated."""
        await self._tasks.close()
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                if self._browser:
                    await self._browser.async_cancel()
                await zeroconf.async_unregister_all_services()
        await zeroconf.async_close()

    # --- finding --------------------------------------------------------------------------------------

    def _service_changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._found.pop(name, None)
            return
        if name == self._name or name in self._resolving or len(self._resolving) >= MAX_RESOLVING:
            return
        if name not in self._found and len(self._found) + len(self._resolving) >= MAX_PEERS:
            return
        self._resolving.add(name)
        self._tasks.start(self._resolve(zeroconf, name), f"mDNS {name}")

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            # What it takes for complete has the machine's addresses, which libp2p does not ask for.
            if not info.load_from_cache(zeroconf) and not info.text:
                await info.async_request(zeroconf, _ASK_SECONDS * 1000)
            found = decode(info.text or b"", self._peer)
        except (OSError, ZeroconfError, ValueError) as exc:
            logger.debug("could not ask for the addresses of %s: %s", name, exc)
            return
        finally:
            self._resolving.discard(name)
        if found and self._found.get(name) != found:
            self._found[name] = found
            logger.info("found %s on the local network", short(found[0].peer))
            self._on_found(found)


def encode(own: Iterable[Multiaddr], peer: PeerId) -> bytes:
    """The TXT record of ``peer`` at ``own`` addresses, those left out that lead through a relay."""
    text = bytearray()
    for address in [address for address in own if not is_relayed(address)][:MAX_ADDRESSES]:
        entry = _KEY + f"{address}/p2p/{peer}".encode()
        if len(entry) <= _LONGEST:
            text += bytes([len(entry)]) + entry
    return bytes(text)


def decode(text: bytes, own: PeerId) -> tuple[Address, ...]:
    """The addresses in a TXT record: those that can be dialled, of the first peer that has one.

    Empty when that is ``own``, or when there is none.
    """
    found: list[Address] = []
    for entry in _strings(text):
        if not entry.startswith(_KEY) or len(found) >= MAX_ADDRESSES:
            continue
        with contextlib.suppress(AddressError, UnicodeDecodeError):
            address = _address(entry.removeprefix(_KEY).decode())
            if not found or found[0].peer == address.peer:
                found.append(address)
    return tuple(found) if found and found[0].peer != own else ()


def _address(text: str) -> Address:
    location, _, peer = str(parse_multiaddr(text)).rpartition("/p2p/")
    address = Address.parse(str(to_address(Multiaddr(location), PeerId(peer))))
    to_multiaddr(address)
    return address


def _strings(text: bytes) -> Sequence[bytes]:
    strings = []
    at = 0
    while at < len(text):
        length = text[at]
        strings.append(text[at + 1 : at + 1 + length])
        at += 1 + length
    return strings
