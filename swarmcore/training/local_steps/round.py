"""One round at its coordinator: who has delivered, and when it is time to end."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Generic, TypeVar

import attrs

from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage

Values = TypeVar("Values")


@attrs.frozen
class Delivery(Generic[Values]):
    """A delta that has arrived."""

    contribution: Contribution
    values: Values
    ends: float
    """When the round has to end for its sender."""


class Round(Generic[Values]):
    """Collects the deltas of one round.

    It is due when all members have delivered, or when the patience of one that has is at its end.
    """

    def __init__(self, lineage: Lineage, members: Collection[PeerId]) -> None:
        self.lineage = lineage
        """What the deltas are to be subtracted from."""
        self.members = frozenset(members)
        self._deliveries: dict[PeerId, Delivery[Values]] = {}

    def __repr__(self) -> str:
        return f"<Round {self.lineage.round} {len(self._deliveries)} of {len(self.missing) + len(self)}>"

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def missing(self) -> frozenset[PeerId]:
        """Members that have not delivered."""
        return self.members - self._deliveries.keys()

    @property
    def deliveries(self) -> list[Delivery[Values]]:
        """In the order of peer ids, which does not depend on who came first."""
        return [self._deliveries[peer] for peer in sorted(self._deliveries)]

    def deliver(self, contribution: Contribution, values: Values, *, now: float, patience: float) -> None:
        """A peer's delta has come; a later one of the same peer replaces it, its end stays."""
        before = self._deliveries.get(contribution.peer)
        ends = now + patience
        if before is not None:
            ends = min(ends, before.ends)
        self._deliveries[contribution.peer] = Delivery(contribution, values, ends)

    def see(self, members: Collection[PeerId]) -> None:
        """These are the members that are alive now."""
        self.members = frozenset(members)

    @property
    def ends(self) -> float:
        """When it has to end."""
        return min((delivery.ends for delivery in self._deliveries.values()), default=math.inf)

    def is_due(self, now: float) -> bool:
        return bool(self._deliveries) and (not self.missing or now >= self.ends)
