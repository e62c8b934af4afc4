"""Which parameters a peer has: a chain of hashes, one link a round, so that peers know when they differ."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Lineage, RoundResult, RunTerms

_NUMBERS = struct.Struct("<QQ")


def founding(terms: RunTerms, parameters: memoryview) -> Lineage:
    """Of a run's first state; ``parameters`` are the bytes of all of them."""
    digest = hashlib.sha256(f"{terms.run}\0{terms.layout}\0".encode())
    digest.update(parameters)
    return Lineage(0, digest.hexdigest(), 0)


def following(result: RoundResult, pieces: Iterable[memoryview]) -> Lineage:
    """What comes after ``result``, whose averaged delta is in ``pieces``, as they travel."""
    before = result.previous
    digest = hashlib.sha256(before.state.encode())
    digest.update(_NUMBERS.pack(before.round + 1, before.work + result.work))
    for piece in pieces:
        digest.update(piece)
    return Lineage(before.round + 1, digest.hexdigest(), before.work + result.work)


def is_better(one: Lineage, other: Lineage) -> bool:
    """Whether ``one`` goes on where the two meet: it has more work in it; if equal, by its hash."""
    return (one.work, one.state) > (other.work, other.state)


def by_rank(run: str, round_number: int, peers: Iterable[PeerId]) -> Sequence[PeerId]:
    """Peers in the order in which they are to coordinate a round, the first choice first.

    Another order every round; where two peers see different members, the order of those that both see is the
    same (rendezvous hashing), so that one who comes or goes seldom changes who is first.
    """
    return sorted(peers, key=lambda peer: hashlib.sha256(f"{run}\0{round_number}\0{peer}".encode()).digest())
