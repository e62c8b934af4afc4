"""What ``serve`` and ``bootstrap`` have in common: where a peer listens, and how it is reached."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarmcore.cli.output import Output
from swarmcore.cli.webrtc import SCHEME as _WEBRTC
from swarmcore.cli.webrtc import transport_options
from swarmcore.errors import InputError
from swarmcore.identity import public_key
from swarmcore.transport import transport_class
from swarmcore.types import Address, PeerId

if TYPE_CHECKING:
    from swarmcore.peer import NetworkConfig

_LIBP2P = "libp2p"

# /tmp/socket is no multiaddr: other transports' places may begin with a slash, too.
_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/")


def network_config(
    peer: PeerId,
    *,
    transports: Sequence[str],
    listen: Sequence[str],
    announce: Sequence[str],
    bootstrap: Sequence[str],
    allowed_peers: Sequence[str],
    allow_file: str | None = None,
    relay: str | None = None,
    relay_peers: Sequence[str] = (),
    no_upnp: bool = False,
    mdns: bool = False,
    registry: str = "gossip",
    **webrtc: Any,
) -> NetworkConfig:
    """Make the configuration of ``peer`` from the values of `network_options`.

    Raise `InputError` for any that cannot work: better before a model is loaded than after.
    """
    from swarmcore.peer import NetworkConfig
    from swarmcore.registry.allow_file import AllowFile

    for address in bootstrap:
        Address.parse(address)
    for allowed in allowed_peers:
        public_key(allowed)
    always = frozenset(map(PeerId, allowed_peers))
    return NetworkConfig(
        transports={
            scheme: places or transport_class(scheme).default_places
            for scheme, places in by_scheme(transports, listen).items()
        },
        announce=tuple(
            str(transport_class(scheme).address_at(place, peer))
            for scheme, places in by_scheme(transports, announce).items()
            for place in places
        ),
        bootstrap=tuple(bootstrap),
        allowed_peers=always or None,
        allow_file=AllowFile(Path(allow_file), always) if allow_file is not None else None,
        options=_libp2p_options(transports, relay, relay_peers, no_upnp, mdns)
        | _webrtc_options(transports, webrtc),
        registry=registry,
        find_neighbours=mdns,
    )


def _webrtc_options(transports: Sequence[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    _check_concerned(_WEBRTC, transports, given)
    return transport_options(**given)


def _libp2p_options(
    transports: Sequence[str], relay: str | None, relay_peers: Sequence[str], no_upnp: bool, mdns: bool
) -> dict[str, dict[str, Any]]:
    given = {"relay": relay, "relay_peer": relay_peers, "no_upnp": no_upnp, "mdns": mdns}
    _check_concerned(_LIBP2P, transports, given)
    options: dict[str, Any] = {}
    if relay is not None:
        options["relay"] = relay
    if relay_peers:
        options["relays"] = tuple(relay_peers)
    if no_upnp:
        options["upnp"] = False
    return {_LIBP2P: options} if options else {}


def _check_concerned(scheme: str, transports: Sequence[str], given: Mapping[str, object]) -> None:
    """Raise `InputError` for flags of a transport that is not used."""
    flags = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if flags and scheme not in transports:
        raise InputError(f"{', '.join(flags)}: only for transport {scheme}; add --transport {scheme}")


def by_scheme(transports: Iterable[str], places: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sort ``--listen`` or ``--announce`` values by transport: ``{"tcp": ("0.0.0.0:4001",)}``.

    A value may carry its scheme (``tcp://…``); with one transport it need not, nor if it is a multiaddr
    (``/ip4/…``), which is libp2p's. Raise `InputError` when a value's transport cannot be told.
    """
    schemes = list(dict.fromkeys(transports))
    found: dict[str, list[str]] = {scheme: [] for scheme in schemes}
    for place in places:
        scheme, colon, rest = place.partition(":")
        if colon and scheme in found:
            found[scheme].append(rest.removeprefix("//"))
        elif _MULTIADDR.match(place):
            if _LIBP2P not in found:
                raise InputError(f"{place!r} is for transport {_LIBP2P!r}; add --transport {_LIBP2P}")
            found[_LIBP2P].append(place)
        elif "://" in place:
            if _WEBRTC in found and scheme in ("ws", "wss"):
                raise InputError(f"{place!r} is where WebRTC peers meet; write {_WEBRTC}:{place}")
            raise InputError(f"{place!r} is for transport {scheme!r}; add --transport {scheme}")
        elif len(schemes) == 1:
            found[schemes[0]].append(place)
        else:
            raise InputError(f"{place!r} could be any of {', '.join(schemes)}; write {schemes[0]}://{place}")
    return {scheme: tuple(values) for scheme, values in found.items()}


class AddressReport:
    """Tells the user where a peer is reached: at first by results, whenever it changes by remarks."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._known: tuple[str, ...] = ()

    def online(self, addresses: Sequence[str]) -> None:
        """What a peer that has come online gives to others."""
        self._known = tuple(addresses)
        for address in addresses:
            self._output.result(address)
        self._say_if_local()

    def changed(self, addresses: tuple[str, ...]) -> None:
        """From now on these; a line for each that is new, and for each that is lost."""
        known, self._known = self._known, addresses
        for address in addresses:
            if address not in known:
                self._output.remark(f"also reached at {address}")
        for address in known:
            if address not in addresses:
                self._output.remark(f"no longer reached at {address}")
        self._say_if_local()
        self._output.event("addresses", addresses=addresses)

    def _say_if_local(self) -> None:
        if self._known and all(Address.parse(url).on_loopback for url in self._known):
            self._output.remark(
                "joinable from this machine only: listen on 0.0.0.0 or [::] to be reached from others; an "
                "address that comes up later is told then"
            )


def say_what_next(output: Output, addresses: Sequence[str], *, model: str = "", chat: str = "") -> None:
    """How others join a peer that is reached at ``addresses``, and talk with its model.

    ``model`` is what another server of it would be started with, ``chat`` a command that talks with it; each
    is empty where there is none.
    """
    if not addresses:
        return
    bootstrap = f"--bootstrap {addresses[0]}"
    output.remark(f"join:  swarmcore serve --model {shlex.quote(model) if model else 'MODEL'} {bootstrap}")
    if chat:
        output.remark(f"chat:  swarmcore {chat} {bootstrap}")
