"""What peers sign of their deltas, and what a coordinator can therefore not make of them."""

from __future__ import annotations

import math

from swarmcore.errors import ProtocolError
from swarmcore.identity import Identity, verify
from swarmcore.training.local_steps.averaging import shares
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms

MOST_SAMPLES = 2**40

_DOMAIN = "swarmcore local-steps delta 1"
"""Nothing else that is signed with the same key begins so."""


def contribute(
    identity: Identity, terms: RunTerms, lineage: Lineage, *, delivery: int, samples: int, length: float
) -> Contribution:
    """The signed claim that a delta of that norm, its length, belongs into the round after ``lineage``."""
    unsigned = Contribution(identity.peer, delivery, samples, length)
    return Contribution(
        identity.peer, delivery, samples, length, identity.sign(_signed(unsigned, terms, lineage))
    )


def is_sound(contribution: Contribution, terms: RunTerms, lineage: Lineage) -> bool:
    """Whether its peer has signed it, for the round after ``lineage``, and its numbers are in range."""
    return (
        0 < contribution.samples <= MOST_SAMPLES
        and 0 <= contribution.length < math.inf
        and verify(contribution.peer, _signed(contribution, terms, lineage), contribution.signature)
    )


def longest_mean(record: RoundResult, terms: RunTerms) -> float:
    """The greatest norm that the mean of a round can have, by the claims that are in it.

    Raise `ProtocolError` when it has none, two of one peer, one that its peer did not sign for this round, or
    when its work is not what the claims come to.
    """
    claims = record.contributions
    if not claims or len({claim.peer for claim in claims}) < len(claims):
        raise ProtocolError("the result of a round has no contributions, or several of one peer")
    if not all(is_sound(claim, terms, record.previous) for claim in claims):
        raise ProtocolError("the result of a round has a contribution that its peer did not sign for it")
    lengths = [claim.length for claim in claims]
    factors, work = shares(lengths, [claim.samples for claim in claims])
    if record.work != work:
        raise ProtocolError(
            f"the result of a round claims {record.work} samples; of its contributions {work} count"
        )
    return sum(factor * length for factor, length in zip(factors, lengths, strict=True))


def _signed(claim: Contribution, terms: RunTerms, lineage: Lineage) -> bytes:
    said = (terms.run, terms.layout, lineage.state, claim.delivery, claim.samples, claim.length.hex())
    return "\0".join((_DOMAIN, *map(str, said))).encode()
