"""Reaching a peer by whichever of its addresses works."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    DeadlineExceededError,
    PeerIdentityError,
    PeerUnreachableError,
    SwarmError,
    UnknownTransportError,
)
from swarmcore.tasks import deadline_at
from swarmcore.transport import Stream, Transport
from swarmcore.types import Address, PeerId, short

T = TypeVar("T")


class NoSuccess(Exception):
    """Every attempt has failed."""


async def first_success(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    *,
    stagger: float,
    at_once: int,
    failed: Callable[[int, SwarmError], None],
    dispose: Callable[[T], object],
) -> T:
    """What the first of ``attempts`` to succeed returns. Raise `NoSuccess` when every one has failed.

    Each starts when the one before has failed or ``stagger`` seconds later; at most ``at_once`` run at a
    time. ``failed`` takes the place of an attempt and the `SwarmError` that ended it; another exception, or
    what ``failed`` raises, ends them all and comes out. Those still under way at the end are cancelled and
    awaited, and a success that comes second is given to ``dispose``.
    """
    running: dict[asyncio.Future[T], int] = {}
    try:
        answer = await _first(deque(enumerate(attempts)), running, stagger, at_once, failed)
    except BaseException:
        await _end(running, dispose)
        raise
    try:
        await _end(running, dispose)
    except BaseException:
        dispose(answer)
        raise
    return answer


async def _first(
    waiting: deque[tuple[int, Callable[[], Awaitable[T]]]],
    running: dict[asyncio.Future[T], int],
    stagger: float,
    at_once: int,
    failed: Callable[[int, SwarmError], None],
) -> T:
    while waiting or running:
        if waiting and len(running) < at_once:
            place, attempt = waiting.popleft()
            running[asyncio.ensure_future(attempt())] = place
        patience = stagger if waiting and len(running) < at_once else None
        done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: running[task]):
            place = running.pop(task)
            try:
                return task.result()
            except SwarmError as exc:
                failed(place, exc)
    raise NoSuccess


async def _end(running: Collection[asyncio.Future[T]], dispose: Callable[[T], object]) -> None:
    def ended(task: asyncio.Future[T]) -> None:
        if not task.cancelled() and task.exception() is None:
            dispose(task.result())

    for task in running:
        task.add_done_callback(ended)
        task.cancel()
    if running:
        await asyncio.wait(running)


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

    def too_late() -> SwarmError:
        late = [address for place, address in enumerate(usable) if place not in failures]
        reasons = [failure.message for failure in failures.values()]
        reasons += [f"{address} did not answer within {patience:.3g} s" for address in late]
        return DeadlineExceededError(reasons[0]) if len(usable) == 1 else _unreachable(usable, reasons)

    try:
        async with deadline_at(deadline, too_late):
            if len(usable) == 1:
                return await transports[usable[0].scheme].open_stream(usable[0])
            return await _race(transports, usable, failures)
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
