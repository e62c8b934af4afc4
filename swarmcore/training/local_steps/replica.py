"""What every peer of a run has: the common parameters, the outer optimiser, and how they came about."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import attrs
import torch

from swarmcore.errors import ProtocolError, StaleRoundError
from swarmcore.training.local_steps.averaging import norm
from swarmcore.training.local_steps.lineage import following, founding, is_better
from swarmcore.training.local_steps.pieces import decode
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms
from swarmcore.wire.tensors import Tensor

KEPT_RESULTS = 4
"""Rounds that a peer may have missed and still catch up with by their results alone."""
_KEPT_CONTRIBUTIONS = 1024
_LARGEST = 2**62


@attrs.frozen(eq=False)
class Result:
    """How a round ended: its record and the averaged delta, in the one encoded form that all apply."""

    record: RoundResult
    pieces: tuple[Tensor, ...]

    @property
    def lineage(self) -> Lineage:
        """What comes after it."""
        return following(self.record, (piece.data for piece in self.pieces))

    @property
    def nbytes(self) -> int:
        return sum(piece.data.nbytes for piece in self.pieces)


class Replica:
    """The common parameters as one float32 vector, and the momentum of the outer optimiser.

    Nesterov's momentum on the averaged delta (DiLoCo, arXiv 2311.08105, algorithm 1). Every operation is
    rounded by itself, so that all processors give the same bits. `parameters` and `velocity` are replaced and
    never changed: who has them may read them at leisure.
    """

    def __init__(self, terms: RunTerms, parameters: torch.Tensor) -> None:
        self.terms = terms
        self.parameters = parameters
        self.velocity = torch.zeros_like(parameters)
        self.lineage = founding(terms, _data_of(parameters))
        self.settled = False
        """Whether these are the run's parameters, and not just what this peer has come with: those give way
        to any others."""
        self.included: dict[PeerId, Contribution] = {}
        """The latest delivery of each peer that went into the parameters."""
        self._results: deque[Result] = deque(maxlen=KEPT_RESULTS)

    def __repr__(self) -> str:
        at = self.lineage
        return f"<Replica {self.terms.run!r} round {at.round} {at.state[:8]} {len(self.parameters)} values>"

    @property
    def last(self) -> RoundResult | None:
        """The round that led here; None when it was not taken part in."""
        return self._results[-1].record if self._results else None

    def apply(self, result: Result) -> None:
        """Take one outer step.

        Raise `StaleRoundError` when it starts from other parameters than these, `DeltaError` when it has
        values that are not finite; nothing changes then.
        """
        if result.record.previous != self.lineage:
            raise StaleRoundError(
                f"a result for round {result.record.previous.round} starts from other parameters than those "
                f"here, of round {self.lineage.round}"
            )
        if not 0 < result.record.work <= sum(c.samples for c in result.record.contributions):
            raise ProtocolError(f"a round of {result.record.work} samples that its peers do not have")
        delta = decode(result.pieces)
        norm(delta)
        momentum = self.terms.momentum
        velocity = self.velocity * momentum
        velocity += delta
        step = velocity * momentum
        step += delta
        step *= self.terms.outer_lr
        self.parameters = self.parameters - step
        self.velocity = velocity
        self.lineage = result.lineage
        self._results.append(result)
        self._include(result.record.contributions)

    def adopt(
        self,
        lineage: Lineage,
        parameters: torch.Tensor,
        velocity: torch.Tensor,
        included: Iterable[Contribution],
    ) -> None:
        """Go on from another peer's state."""
        norm(parameters)
        norm(velocity)
        if not 0 <= lineage.round < _LARGEST or not 0 <= lineage.work < _LARGEST:
            raise ProtocolError(f"a state of {lineage.round} rounds and {lineage.work} samples")
        self.parameters, self.velocity, self.lineage = parameters, velocity, lineage
        self.included = {}
        self._include(included)
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

    def _include(self, contributions: Iterable[Contribution]) -> None:
        for contribution in contributions:
            self.included.pop(contribution.peer, None)  # to the end, so that the oldest go first
            self.included[contribution.peer] = contribution
        while len(self.included) > _KEPT_CONTRIBUTIONS:
            del self.included[next(iter(self.included))]


def _data_of(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
