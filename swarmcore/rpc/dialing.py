"""Reaching a peer by whichever of its addresses works."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    DeadlineExceededError,
    PeerIdentityError,
    PeerUnreachableError,
    SwarmError,
    UnknownTransportError,
)
from swarmcore.rpc.racing import NoSuccess, first_success
from swarmcore.transport import Stream, Transport
from swarmcore.types import Address, PeerId, short

STAGGER = 0.25
"""Seconds that each address of a peer is ahead of the next one."""

_TRY_ANOTHER = (AddressError, ConnectionLostError, PeerIdentityError, PeerUnreachableError)


def one_peer(to: Address | Sequence[Address]) -> tuple[PeerId, list[Address]]:
    """The peer that all of ``to`` belong to. Raise `AddressError` when there is none or more than one."""
    addresses = [to] if isinstance(to, Address) else list(to)
    peers = {address.peer for address in addresses}
    if len(peers) != 1:
        raise AddressError(f"expected the addresses of one peer, got those of {len(peers)}")
    return peers.pop(), addresses


async def dial(transports: Mapping[str, Transport], addresses: Sequence[Address], deadline: float) -> Stream:
    """Open a stream to whichever address answers first.

    They are tried in the order of ``transports``, within one in that of `Transport.preference`, each when the
    one before has failed or `STAGGER` seconds later: a silent address costs the next one no more than that.

    Raise `UnknownTransportError` when no transport fits any address, `PeerUnreachableError` when none answers
    (`PeerIdentityError` when the only one is answered by somebody else), `DeadlineExceededError` when the
    loop time ``deadline`` passes first.
    """
    usable = _in_order(transports, addresses)
    if not usable:
        wanted = ", ".join(sorted({address.scheme for address in addresses}))
        ours = ", ".join(transports) or "no transport"
        raise UnknownTransportError(
            f"the peer is reached by {wanted}, but this node has only {ours}; "
            f"start it with a transport for one of the peer's addresses"
        )
    patience = deadline - asyncio.get_running_loop().time()
    failures: dict[int, SwarmError] = {}
    try:
        async with asyncio.timeout_at(deadline) as clock:
            if len(usable) == 1:
                return await transports[usable[0].scheme].open_stream(usable[0])
            return await _race(transports, usable, failures)
    except TimeoutError as exc:
        if not clock.expired():
            raise
        late = [address for place, address in enumerate(usable) if place not in failures]
        reasons = [failure.message for failure in failures.values()]
        reasons += [f"{address} did not answer within {patience:.3g} s" for address in late]
        if len(usable) == 1:
            raise DeadlineExceededError(reasons[0]) from exc
        raise _unreachable(usable, reasons) from exc
    except NoSuccess:
        reasons = [failure.message for _, failure in sorted(failures.items())]
        raise _unreachable(usable, reasons) from None
    finally:
        failures.clear()  # each holds this frame, by its traceback: a cycle for every failed dial


def _in_order(transports: Mapping[str, Transport], addresses: Sequence[Address]) -> list[Address]:
    """Those of ``addresses`` that have a transport, the one to try first at the beginning."""
    usable = [address for address in addresses if address.scheme in transports]
    if len(usable) < 2:
        return usable
    order = list(transports)
    return sorted(usable, key=lambda a: (order.index(a.scheme), transports[a.scheme].preference(a)))


async def _race(
    transports: Mapping[str, Transport], addresses: Sequence[Address], failures: dict[int, SwarmError]
) -> Stream:
    def failed(place: int, exc: SwarmError) -> None:
        if not isinstance(exc, _TRY_ANOTHER):
            raise exc
        failures[place] = exc

    return await first_success(
        [partial(transports[address.scheme].open_stream, address) for address in addresses],
        stagger=STAGGER,
        at_once=len(addresses),
        failed=failed,
        dispose=lambda stream: stream.abort("another address answered first"),
    )


def _unreachable(addresses: Sequence[Address], reasons: Sequence[str]) -> PeerUnreachableError:
    peer = short(addresses[0].peer)
    return PeerUnreachableError(f"{peer} answers on none of its addresses: {'; '.join(reasons)}")
