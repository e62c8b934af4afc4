"""Which head peer makes a text for a client that has no part of the model. A plain object."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random

from swarmcore.client.served_models import called
from swarmcore.errors import InputError
from swarmcore.registry.base import SwarmView
from swarmcore.sources import is_called
from swarmcore.types import PeerId, ServerInfo


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
