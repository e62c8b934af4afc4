"""The records of the local-steps protocol: deltas of parameters between the peers of one training run.

All parameters together are one vector. It travels in pieces of `PIECE_VALUES` float32 values (the last may be
shorter), each one tensor ``values`` beside a `Piece`.
"""

from __future__ import annotations

import attrs

from swarmcore.types import PeerId
from swarmcore.wire.framing import wire_tag
from swarmcore.wire.method import Method, Protocol

LOCAL_STEPS = "/swarmcore/localsteps/1"
LOCAL_STEPS_STANDING = "/swarmcore/localsteps/standing/1"

PIECE_VALUES = 2**18
"""Values of a piece: 1 MiB before it is encoded."""


@attrs.frozen
class RunTerms:
    """What the peers of a run have to agree on."""

    run: str
    values: int
    """Of all parameters together."""
    layout: str
    """SHA-256 of the parameters' names and shapes, in hex."""
    outer_lr: float
    momentum: float


@attrs.frozen
class Lineage:
    """Which parameters: those that follow from a first state by a chain of rounds."""

    round: int
    """Rounds so far."""
    state: str
    """SHA-256 in hex of the state before and of the last round's result; of the parameters for the first."""
    work: int
    """Samples that went into all rounds so far. Where two lineages meet, the one with more goes on."""


@attrs.frozen
class Contribution:
    """One peer's part in a round."""

    peer: PeerId
    delivery: int
    """Random number of the delivered delta: the peer's own means to know it again."""
    samples: int
    length: float = 0.0
    """Euclidean norm of the delta, as it travelled."""
    signature: bytes = b""
    """The peer's, for the round that it is in."""


@wire_tag("DeliverDelta")
@attrs.frozen
class DeliverDelta:
    """To the coordinator, first message: pieces of a delta follow."""

    terms: RunTerms
    lineage: Lineage
    """What the delta is to be subtracted from."""
    delivery: int
    samples: int
    patience: float
    """Seconds after which the round has to end, whoever is missing."""
    length: float = 0.0
    signature: bytes = b""
    """With ``length`` as in `Contribution`."""


@wire_tag("FetchState")
@attrs.frozen
class FetchState:
    """First message: send what leads from the state ``have`` to the current one."""

    terms: RunTerms
    have: str = ""
    """Empty when nothing is of use."""


@wire_tag("Piece")
@attrs.frozen
class Piece:
    """Values from index ``first`` on, as tensor ``values``."""

    first: int


@wire_tag("RoundOpen")
@attrs.frozen
class RoundOpen:
    """From the coordinator, every now and then: the round waits for more deltas."""

    delivered: int
    members: int


@wire_tag("GoTo")
@attrs.frozen
class GoTo:
    """From a peer that does not coordinate after all: another one has the round open."""

    peer: PeerId


@wire_tag("RoundResult")
@attrs.frozen
class RoundResult:
    """The end of a round; pieces of the averaged delta follow."""

    previous: Lineage
    contributions: tuple[Contribution, ...]
    work: int
    """Samples that count of this round's contributions together."""


@wire_tag("ResultsFollow")
@attrs.frozen
class ResultsFollow:
    """The answer to `FetchState` where few rounds are missing: so many `RoundResult`, each with pieces."""

    count: int


@wire_tag("StateFollows")
@attrs.frozen
class StateFollows:
    """The answer to `FetchState` else: pieces of all parameters, then of the outer optimiser's momentum."""

    lineage: Lineage
    included: tuple[Contribution, ...] = ()
    """The latest delivery of each peer that went into these parameters."""


@wire_tag("AskStanding")
@attrs.frozen
class AskStanding:
    """Ask a peer of a run how far it is."""

    terms: RunTerms


@wire_tag("Standing")
@attrs.frozen
class Standing:
    """How far a peer is."""

    lineage: Lineage
    delivered: int = 0
    """Deltas that it holds for the round that follows; not 0 when it coordinates that round."""
    settled: bool = True
    """Whether these are the run's parameters, and not what a newcomer has brought along."""


LOCAL_STEPS_PROTOCOL = Protocol(
    name=LOCAL_STEPS,
    openings=(DeliverDelta, FetchState),
    to_acceptor=(Piece,),
    to_opener=(RoundOpen, GoTo, RoundResult, ResultsFollow, StateFollows, Piece),
)
STANDING_METHOD = Method(name=LOCAL_STEPS_STANDING, request=AskStanding, reply=Standing)
