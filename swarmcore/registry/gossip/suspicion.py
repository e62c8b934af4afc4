"""Suspicions: signed claims that a peer is dead, and whose claims are worth a look."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from functools import lru_cache

import attrs

from swarmcore.identity import Identity, verify
from swarmcore.pacing import TokenBucket
from swarmcore.types import PeerId

_DOMAIN = b"swarmcore registry suspicion 1\0"

BURST = 32
"""Suspicions that one accuser may raise at once, and again every `REFILL` seconds."""
REFILL = 5.0
SHORTEST_MUTE = 10.0
LONGEST_MUTE = 600.0
MAX_ACCUSERS = 4096


@attrs.frozen
class Suspected:
    """``by`` got no answer from ``peer``. Nobody acts on it before he has asked that peer himself."""

    by: PeerId
    peer: PeerId
    sequence: int
    """Of the suspect's record: a newer one refutes this."""
    signature: bytes
    """By the accuser."""

    @classmethod
    def sign(cls, identity: Identity, peer: PeerId, sequence: int) -> Suspected:
        return cls(identity.peer, peer, sequence, identity.sign(_signed(peer, sequence)))

    def is_signed(self) -> bool:
        """Whether the accuser has signed it."""
        return _is_signed(self)


def _signed(peer: PeerId, sequence: int) -> bytes:
    return _DOMAIN + f"{sequence} {peer}".encode()


@lru_cache(maxsize=4096)
def _is_signed(suspected: Suspected) -> bool:
    return verify(suspected.by, _signed(suspected.peer, suspected.sequence), suspected.signature)


@attrs.define
class _Standing:
    """What is remembered of one accuser."""

    credit: TokenBucket = attrs.field(factory=lambda: TokenBucket(BURST / REFILL, BURST))
    mute_until: float = 0.0
    mute: float = 0.0


class Credibility:
    """Whose suspicions to look into. A plain object: ``now`` is always passed in.

    An accuser has credit for `BURST` suspicions, which comes back within `REFILL` seconds. One who suspected
    a peer that answers is not heard for `SHORTEST_MUTE` seconds, twice as long each further time, up to
    `LONGEST_MUTE`; as long a time without a wrong word after that, and it is forgotten.
    """

    def __init__(self) -> None:
        self._standings: OrderedDict[PeerId, _Standing] = OrderedDict()

    def __len__(self) -> int:
        return len(self._standings)

    def believes(self, accuser: PeerId, now: float) -> bool:
        """Whether ``accuser`` is heard at all."""
        standing = self._standings.get(accuser)
        return standing is None or now >= standing.mute_until

    def spend(self, accuser: PeerId, now: float) -> bool:
        """Whether to hear one more suspicion of ``accuser``; it then counts against his credit."""
        standing = self._standing(accuser)
        return now >= standing.mute_until and standing.credit.take(now)

    def was_wrong(self, accusers: Collection[PeerId], now: float) -> None:
        """The peer that ``accusers`` suspected has answered."""
        for accuser in accusers:
            standing = self._standing(accuser)
            forgiven = now >= standing.mute_until + standing.mute
            standing.mute = SHORTEST_MUTE if forgiven else min(2 * standing.mute, LONGEST_MUTE)
            standing.mute_until = now + standing.mute

    def _standing(self, accuser: PeerId) -> _Standing:
        standing = self._standings.setdefault(accuser, _Standing())
        self._standings.move_to_end(accuser)
        if len(self._standings) > MAX_ACCUSERS:
            self._standings.popitem(last=False)
        return standing
