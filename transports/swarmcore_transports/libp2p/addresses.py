"""By which addresses this peer can be reached, as far as it knows at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from multiaddr import Multiaddr

from swarmcore_transports.libp2p.multiaddrs import preference, reach

AddressSource = Literal["listening", "mapped", "verified", "relayed"]
"""Where an address comes from: a socket here, a port that the router maps, an address at which another peer
has reached this one, a relay at which it has a reservation."""

MAX_ADDRESSES = 12
"""Addresses to announce, so that they fit into a record. A machine with containers has a LAN for each."""


class AddressManager:
    """A plain object; ``on_change`` is called after every change of `all`.

    Addresses are without this peer's id at their end. With ``fixed`` the others are known but not told.
    """

    def __init__(self, fixed: Sequence[Multiaddr], on_change: Callable[[], None]) -> None:
        self._fixed = list(fixed)
        self._on_change = on_change
        self._by_source: dict[AddressSource, list[Multiaddr]] = {}
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, subscriber: Callable[[], None]) -> None:
        """Call ``subscriber`` after every change of what any source gives, told to others or not."""
        self._subscribers.append(subscriber)

    @property
    def public(self) -> bool:
        """Whether everybody is known to reach this peer, or its owner says so.

        An IPv6 address that is valid everywhere says nothing: routers of homes let nobody in by it.
        """
        certain = [*self._fixed, *self.of("listening")]
        return bool(self.of("verified")) or any(
            reach(address) == "public" and not str(address).startswith("/ip6") for address in certain
        )

    def of(self, source: AddressSource) -> list[Multiaddr]:
        """Those that came from ``source``."""
        return list(self._by_source.get(source, ()))

    def put(self, source: AddressSource, addresses: Iterable[Multiaddr]) -> None:
        """Replace those of ``source``."""
        addresses = list(addresses)
        if addresses == self.of(source):
            return
        before = self.all()
        self._by_source[source] = addresses
        if self.all() != before:
            self._on_change()
        for subscriber in self._subscribers:
            subscriber()

    def all(self) -> list[Multiaddr]:
        """Those to announce, in the order in which others should try them.

        At most `MAX_ADDRESSES` and those given at the start; above that the last ones of LANs are left out.
        """
        if self._fixed:
            return [*self._fixed, *self.of("relayed")]
        known = {str(address): address for addresses in self._by_source.values() for address in addresses}
        lan = [text for text, address in known.items() if reach(address) == "lan"]
        excess = max(0, len(known) - MAX_ADDRESSES)
        for text in lan[max(0, len(lan) - excess) :]:
            del known[text]
        return sorted(known.values(), key=preference)[:MAX_ADDRESSES]
