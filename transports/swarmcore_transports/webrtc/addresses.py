"""The addresses of WebRTC peers: ``webrtc://host:port/<peer id>``, or ``webrtc:wss://…`` with TLS."""

from __future__ import annotations

import re

import attrs

from swarmcore.errors import AddressError
from swarmcore.types import Address, PeerId
from swarmcore_transports.listener import Endpoint
from swarmcore_transports.local_addresses import undialable

SCHEME = "webrtc"
PATH = "/swarmcore/signalling/1"
"""Where on its host a signalling service answers."""

_SERVICE = re.compile(
    r"(?:(?P<scheme>wss?):)?(?://)?(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+):(?P<port>\d{1,5})/?"
)


@attrs.frozen
class ServiceAddress:
    """A signalling service."""

    host: str
    """A name or a literal address, IPv6 without brackets."""
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> ServiceAddress:
        """Read ``host:port``, ``ws://host:port`` or ``wss://host:port``. Raise `AddressError` on all else."""
        match = _SERVICE.fullmatch(text)
        if not match or int(match["port"]) > 65535:
            raise AddressError(
                f"{text!r} is not a signalling service; expected HOST:PORT, or wss://HOST:PORT for TLS"
            )
        host = match["host"].removeprefix("[").removesuffix("]")
        return cls(host, int(match["port"]), match["scheme"] == "wss")

    def from_here(self) -> ServiceAddress:
        """Where the machine reaches it that runs it, should it listen on all addresses."""
        return attrs.evolve(self, host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def url(self) -> str:
        """Where a WebSocket to it is opened."""
        return f"{'wss' if self.tls else 'ws'}://{self.endpoint}{PATH}"

    def address(self, peer: PeerId) -> Address:
        """The address of ``peer``, who listens at this service."""
        return Address(SCHEME, f"{'wss:' if self.tls else ''}//{self.endpoint}", peer)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.host, self.port)

    def __str__(self) -> str:
        return f"{'wss://' if self.tls else ''}{self.endpoint}"


def service_of(address: Address) -> ServiceAddress:
    """The signalling service of ``address``. Raise `AddressError` when it is no address of WebRTC."""
    if address.scheme != SCHEME:
        raise AddressError(f"{str(address)!r} is no address of WebRTC; expected webrtc://HOST:PORT/<peer id>")
    service = ServiceAddress.parse(address.location)
    if reason := undialable(service.host, service.port):
        raise AddressError(f"nobody can dial {address}: {reason}")
    return service


def announced_location(text: str, peer: PeerId) -> str:
    """What ``--announce`` says, a whole address or ``host:port``, without the peer."""
    if not text.startswith(f"{SCHEME}:"):
        return text
    address = Address.parse(text)
    if address.peer != peer:
        raise AddressError(f"cannot announce {text!r}: it names another peer than this one, {peer}")
    return address.location


def announced_service(text: str, peer: PeerId) -> ServiceAddress:
    """The service that ``--announce`` names. Raise `AddressError` when it is none that others can reach."""
    place = announced_location(text, peer).removesuffix(f"/{peer}")
    return service_of(ServiceAddress.parse(place).address(peer))
