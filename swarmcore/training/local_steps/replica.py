"""What every peer of a run has: the common parameters, the outer optimiser, and their lineage.

A lineage is a chain of hashes, one link a round, so that peers know when their parameters differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch

from swarmcore.errors import ProtocolError, StaleRoundError
from swarmcore.training.local_steps.contributions import longest_mean, norm
from swarmcore.training.local_steps.vectors import decode
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms
from swarmcore.wire.tensors import Tensor

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


KEPT_RESULTS = 4
"""Rounds that a peer may have missed and still catch up with by their results alone."""
_KEPT_CONTRIBUTIONS = 1024
_LARGEST = 2**62
_CODEC_MARGIN = 1.1
"""A lossy codec may make a mean a little longer."""


@attrs.frozen(eq=False)
class Result:
    """How a round ended: its record and the averaged delta, in the one encoded form that all apply.

    Creating one hashes all of it; of large ones in a thread.
    """

    record: RoundResult
    pieces: tuple[Tensor, ...]
    lineage: Lineage = attrs.field(init=False)
    """What comes after it."""

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "lineage", following(self.record, (piece.data for piece in self.pieces)))

    @property
    def nbytes(self) -> int:
        return sum(piece.data.nbytes for piece in self.pieces)


@attrs.frozen(eq=False)
class State:
    """The common parameters as one float32 vector, and the momentum of the outer optimiser.

    Neither it nor its vectors are ever changed: who has one may read it at leisure, in any thread.
    """

    lineage: Lineage
    parameters: torch.Tensor
    velocity: torch.Tensor
    included: Mapping[PeerId, Contribution]
    """The latest delivery of each peer that went into the parameters."""

    @classmethod
    def first(cls, terms: RunTerms, parameters: torch.Tensor) -> State:
        """What a run begins with. Raise `DeltaError` for values that are not finite."""
        norm(parameters, "the model")
        data = parameters.view(torch.uint8).numpy().data
        return cls(founding(terms, data), parameters, torch.zeros_like(parameters), {})

    @classmethod
    def of(
        cls,
        lineage: Lineage,
        parameters: torch.Tensor,
        velocity: torch.Tensor,
        included: Iterable[Contribution],
    ) -> State:
        """Another peer's. Raise `DeltaError` or `ProtocolError` for values that no state has."""
        norm(parameters, "a state")
        norm(velocity, "the momentum of a state")
        if not 0 <= lineage.round < _LARGEST or not 0 <= lineage.work < _LARGEST:
            raise ProtocolError(f"a state of {lineage.round} rounds and {lineage.work} samples")
        return cls(lineage, parameters, velocity, _latest({}, included))

    def has(self, peer: PeerId, delivery: int) -> bool:
        """Whether the latest of ``peer``'s deltas that went in is this one."""
        return peer in self.included and self.included[peer].delivery == delivery

    def after(self, result: Result, terms: RunTerms) -> State:
        """One outer step further: Nesterov's momentum on the mean (DiLoCo, arXiv 2311.08105, algorithm 1).

        Every operation is rounded by itself, so that all processors give the same bits. Raise
        `StaleRoundError` when the result starts from other parameters, `DeltaError` when it has values that
        are not finite, `ProtocolError` when it cannot be the mean of its contributions.
        """
        record = result.record
        if record.previous != self.lineage:
            raise StaleRoundError(
                f"a result for round {record.previous.round} starts from other parameters than those here, "
                f"of round {self.lineage.round}"
            )
        longest = longest_mean(record, terms)
        delta = decode(result.pieces)
        length = norm(delta, "the mean of a round")
        if length > _CODEC_MARGIN * longest:
            raise ProtocolError(
                f"the result of a round has the norm {length:g}, and the mean of its contributions has "
                f"{longest:g} at most"
            )
        velocity = self.velocity * terms.momentum
        velocity += delta
        step = velocity * terms.momentum
        step += delta
        step *= terms.outer_lr
        parameters = self.parameters - step
        return State(result.lineage, parameters, velocity, _latest(self.included, record.contributions))


class Replica:
    """This peer's copy of the run's `State`, and the last results that led there."""

    def __init__(self, terms: RunTerms, state: State, *, settled: bool = False) -> None:
        self.terms = terms
        self.state = state
        self.settled = settled
        """Whether these are the run's parameters, and not just what this peer has come with: those give way
        to any others."""
        self._results: deque[Result] = deque(maxlen=KEPT_RESULTS)
        self._changing = asyncio.Lock()

    def __repr__(self) -> str:
        at = self.lineage
        return f"<Replica {self.terms.run!r} round {at.round} {at.state[:8]} {self.terms.values} values>"

    @property
    def lineage(self) -> Lineage:
        return self.state.lineage

    @property
    def last(self) -> RoundResult | None:
        """The round that led here; None when it was not taken part in."""
        return self._results[-1].record if self._results else None

    async def apply(self, result: Result) -> None:
        """Go on to the `State.after` it, found in a thread; harmless where that has been done.

        Raise as that does; nothing changes then, nor when it is cancelled.
        """
        async with self._changing:
            if result.lineage == self.lineage:
                return
            self.state = await asyncio.to_thread(self.state.after, result, self.terms)
            self._results.append(result)

    async def adopt(self, state: State) -> None:
        """Go on from another peer's state, if this one gives way to it."""
        async with self._changing:
            if self.gives_way_to(state.lineage):
                self.state = state
                self._results.clear()

    def gives_way_to(self, lineage: Lineage) -> bool:
        """Whether this peer is to go on from ``lineage`` instead."""
        return lineage != self.lineage and (not self.settled or is_better(lineage, self.lineage))

    def since(self, state: str) -> Sequence[Result] | None:
        """The results that lead from ``state`` to the current one; None when they are not all here."""
        if state == self.lineage.state:
            return []
        results = list(self._results)
        for index, result in enumerate(results):
            if result.record.previous.state == state:
                return results[index:]
        return None


def _latest(
    before: Mapping[PeerId, Contribution], contributions: Iterable[Contribution]
) -> Mapping[PeerId, Contribution]:
    latest = dict(before)
    for contribution in contributions:
        latest.pop(contribution.peer, None)  # to the end, so that the oldest go first
        latest[contribution.peer] = contribution
    for peer in list(latest)[: max(0, len(latest) - _KEPT_CONTRIBUTIONS)]:
        del latest[peer]
    return latest
