"""From the options of a listening peer to its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from swarmcore.errors import InputError
from swarmcore.identity import public_key
from swarmcore.types import Address, PeerId

if TYPE_CHECKING:
    from swarmcore.server.run import NetworkConfig

# Where a transport listens when the user does not say; others than these have no place that always works.
_DEFAULT_PLACES = {"tcp": ("0.0.0.0:0",)}


def network_config(
    peer: PeerId,
    *,
    transports: Sequence[str],
    listen: Sequence[str],
    announce: Sequence[str],
    bootstrap: Sequence[str],
    allowed_peers: Sequence[str],
) -> NetworkConfig:
    """Make the configuration of ``peer`` from the values of `network_options`.

    Raise `InputError` for any that cannot work: better before a model is loaded than after.
    """
    from swarmcore.server.run import NetworkConfig

    for address in bootstrap:
        Address.parse(address)
    for allowed in allowed_peers:
        public_key(allowed)
    return NetworkConfig(
        transports={
            scheme: places or _DEFAULT_PLACES.get(scheme, ())
            for scheme, places in by_scheme(transports, listen).items()
        },
        announce=tuple(
            _announced(scheme, place, peer)
            for scheme, places in by_scheme(transports, announce).items()
            for place in places
        ),
        bootstrap=tuple(bootstrap),
        allowed_peers=frozenset(map(PeerId, allowed_peers)) or None,
    )


def _announced(scheme: str, place: str, peer: PeerId) -> str:
    """The whole address: people type ``example.org:4001``, others dial ``tcp://example.org:4001/12D3Koo…``."""
    location = place.removesuffix(f"/{peer}")
    return str(Address(scheme, location if location.startswith("/") else f"//{location}", peer))


def by_scheme(transports: Iterable[str], places: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sort ``--listen`` or ``--announce`` values by transport: ``{"tcp": ("0.0.0.0:4001",)}``.

    A value may carry its scheme (``tcp://…``); with one transport it need not. Raise `InputError` when a
    value's transport cannot be told.
    """
    schemes = list(dict.fromkeys(transports))
    found: dict[str, list[str]] = {scheme: [] for scheme in schemes}
    for place in places:
        scheme, colon, rest = place.partition(":")
        if colon and scheme in found:
            found[scheme].append(rest.removeprefix("//"))
        elif "://" in place:
            raise InputError(f"{place!r} is for transport {scheme!r}; add --transport {scheme}")
        elif len(schemes) == 1:
            found[schemes[0]].append(place)
        else:
            raise InputError(f"{place!r} could be any of {', '.join(schemes)}; write {schemes[0]}://{place}")
    return {scheme: tuple(values) for scheme, values in found.items()}
