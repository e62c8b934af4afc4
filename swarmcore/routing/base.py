"""What every router does: a chain of servers out of a view of the swarm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from swarmcore.registry.base import SwarmView
from swarmcore.routing.chain import Chain
from swarmcore.routing.costs import ChainCost
from swarmcore.routing.coverage import Bans
from swarmcore.types import ModelInfo, PeerId, Span


class Router(ABC):
    """Chooses chains. A plain object: the view comes in, the chain goes out."""

    @abstractmethod
    def plan(
        self,
        view: SwarmView,
        model: ModelInfo,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        banned: Bans = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        """The chain for blocks ``span`` of ``model``, for a session that will need ``tokens`` of cache.

        Peers in ``blocked`` are not used; those in ``banned`` only for blocks that nobody else holds, and of
        them no more than it takes, those whose ban ends first.
        ``after`` and ``before`` are the servers between which the chain will stand, None for the client
        itself. Raise `MissingBlocksError` when no servers outside ``blocked`` cover the span,
        `ModelMismatchError` when the only servers of a model of that name hold other weights.
        """

    def admits(self, peer: PeerId) -> bool:
        """Whether this router may use the peer at all."""
        return True

    def cost(
        self,
        view: SwarmView,
        model: ModelInfo,
        chain: Chain,
        *,
        tokens: int = 0,
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> ChainCost | None:
        """What a decode step through ``chain`` is expected to take; None where chains are not weighed.

        With ``tokens`` also the wait for room for so many, as part of the queues.
        """
        return None

    def prefill_seconds(self, view: SwarmView, model: ModelInfo, chain: Chain, tokens: int) -> float:
        """What ``tokens`` at once, a prompt or a replay, are expected to take through ``chain`` from here."""
        return 0.0
