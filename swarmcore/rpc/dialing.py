"""Reaching a peer by whichever of its addresses works."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    DeadlineExceededError,
    PeerIdentityError,
    PeerUnreachableError,
    SwarmError,
    UnknownTransportError,
)
from swarmcore.transport import Stream, Transport
from swarmcore.types import Address, PeerId, short


def one_peer(to: Address | Sequence[Address]) -> tuple[PeerId, list[Address]]:
    """The peer that all of ``to`` belong to. Raise `AddressError` when there is none or more than one."""
    addresses = [to] if isinstance(to, Address) else list(to)
    peers = {address.peer for address in addresses}
    if len(peers) != 1:
        raise AddressError(f"expected the addresses of one peer, got those of {len(peers)}")
    return peers.pop(), addresses


async def dial(transports: Mapping[str, Transport], addresses: Sequence[Address], deadline: float) -> Stream:
    """Open a stream to the first address that answers, in the order of ``transports``.

    Raise `UnknownTransportError` when no transport fits any address, `PeerUnreachableError` when none answers
    (`PeerIdentityError` when the only one is answered by somebody else), `DeadlineExceededError` when the
    loop time ``deadline`` passes first.
    """
    order = list(transports)
    usable = sorted((a for a in addresses if a.scheme in transports), key=lambda a: order.index(a.scheme))
    if not usable:
        wanted = ", ".join(sorted({address.scheme for address in addresses}))
        raise UnknownTransportError(
            f"the peer is reached by {wanted}, but this node has only {', '.join(order) or 'no transport'}; "
            f"start it with a transport for one of the peer's addresses"
        )
    now = asyncio.get_running_loop().time
    failures: list[SwarmError] = []
    for position, address in enumerate(usable):
        # Each address gets its share of the time that is left: a silent first one must not eat it all.
        share = (deadline - now()) / (len(usable) - position)
        try:
            async with asyncio.timeout(share) as clock:
                return await transports[address.scheme].open_stream(address)
        except TimeoutError:
            if not clock.expired():
                raise
            failures.append(DeadlineExceededError(f"{address} did not answer within {share:.3g} s"))
        except (PeerUnreachableError, PeerIdentityError, ConnectionLostError) as exc:
            failures.append(exc)
    try:
        if len(failures) == 1:
            raise failures[0]
        reasons = "; ".join(failure.message for failure in failures)
        raise PeerUnreachableError(f"{short(usable[0].peer)} answers on none of its addresses: {reasons}")
    finally:
        failures.clear()  # each holds this frame, by its traceback: a cycle for every failed dial
