"""Getting an answer from any one of several peers, the dead ones among them costing little time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.registry.gossip.members import Partner, describe
from swarmcore.rpc.dialing import NoSuccess, first_success

T = TypeVar("T")

STAGGER = 0.3
"""Seconds that each peer is ahead of the next one."""
AT_ONCE = 8


async def first_answer(
    partners: Sequence[Partner],
    attempt: Callable[[Partner], Awaitable[T]],
    *,
    dispose: Callable[[T], object] = lambda answer: None,
) -> T:
    """The first answer that ``attempt`` gets from one of ``partners``, tried in their order.

    Each starts when the one before has failed or `STAGGER` seconds later; at most `AT_ONCE` run at a time.
    Those still under way at the end are cancelled, and an answer that comes second is given to ``dispose``.
    Raise `PeerUnreachableError`, naming all that was tried and why it failed, when there is no answer.
    """
    failures: list[str] = []

    def failed(place: int, exc: SwarmError) -> None:
        failures.append(f"{describe([partners[place]])} ({exc.message})")

    attempts = [partial(attempt, partner) for partner in partners]
    try:
        return await first_success(attempts, stagger=STAGGER, at_once=AT_ONCE, failed=failed, dispose=dispose)
    except NoSuccess:
        reasons = "; ".join(failures)
        raise PeerUnreachableError(f"none of the peers to join through answers: {reasons}") from None
