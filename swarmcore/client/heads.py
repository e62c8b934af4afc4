"""Which head peer makes a text for a client that has no part of the model. A plain object."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random

from swarmcore.client.served_models import called
from swarmcore.errors import InputError, MissingHeadError
from swarmcore.registry.base import SwarmView
from swarmcore.sources import is_called
from swarmcore.types import ModelInfo, PeerId, ServerInfo


class HeadChoice:
    """Picks head peers of one model, any of them as soon as another; those that leave or are banned last.

    ``model`` is a name, a source or a fingerprint, or empty for the only one there is. From the first pick on
    it is the one with that fingerprint. ``admits`` says which peers may be used at all.
    """

    def __init__(
        self, model: str, rng: Random, *, admits: Callable[[PeerId], bool] = lambda peer: True
    ) -> None:
        self.model = model
        self._rng = rng
        self._admits = admits

    def pick(
        self, view: SwarmView, *, banned: Collection[PeerId] = (), tried: Collection[PeerId] = ()
    ) -> ServerInfo | None:
        """A head peer that is not among ``tried``; None when there is none.

        Raise `InputError` when the model is not named and there are several, or the name stands for several.
        """
        offers = [
            (server, model)
            for server in sorted(view, key=lambda server: server.peer)
            for model in server.heads
            if (not self.model or is_called(model, self.model)) and self._admits(server.peer)
        ]
        found = {model.fingerprint: model for _, model in offers}
        if len(found) > 1:
            raise InputError(
                f"head peers of this swarm make texts of {', '.join(map(called, found.values()))}; say with "
                f"model which, by name, source or fingerprint"
            )
        able = [server for server, _ in offers if server.peer not in tried]
        if not able:
            return None
        (self.model,) = found
        self._rng.shuffle(able)
        return min(able, key=lambda server: (server.peer in banned, server.state == "draining"))

    def offer(self, view: SwarmView) -> ModelInfo:
        """The model of which somebody makes texts. Raise as `pick`, and `MissingHeadError` if nobody does."""
        head = self.pick(view)
        if head is None:
            raise self.missing(view)
        return next(model for model in head.heads if model.fingerprint == self.model)

    def missing(self, view: SwarmView) -> MissingHeadError:
        """That there is none to pick, and what to do about it."""
        of = f" of {self.model}" if self.model else ""
        offered = ", ".join(called(model) for model, _ in view.heads())
        if offered:
            return MissingHeadError(
                f"no peer that this client may use makes texts{of} for clients without a part of the model; "
                f"in this swarm they are made of {offered}"
            )
        return MissingHeadError(
            f"no peer of this swarm makes texts{of} for clients without a part of the model; start one: "
            f"swarmcore serve --serve-head, or swarmcore bootstrap --serve-head --model MODEL"
        )
