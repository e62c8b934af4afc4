"""The registry seam: who serves what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Literal

import attrs

from swarmcore.types import Address, ModelInfo, PeerId, ServerInfo


@attrs.frozen
class Change:
    """One difference between two views: a peer that appeared, changed what it announces, or is gone."""

    kind: Literal["joined", "updated", "left"]
    info: ServerInfo
    """What is announced now; for ``"left"`` what was announced last."""


@attrs.frozen
class SwarmView:
    """Everything known of a swarm at one moment. Immutable; ``revision`` grows with every change."""

    servers: Mapping[PeerId, ServerInfo]
    revision: int = 0

    def __iter__(self) -> Iterator[ServerInfo]:
        return iter(self.servers.values())

    def __len__(self) -> int:
        return len(self.servers)

    def serving(self, fingerprint: str) -> list[ServerInfo]:
        """Peers that announce blocks of the model with this fingerprint, in any state, by span."""
        found = [s for s in self if s.model is not None and s.span and s.model.fingerprint == fingerprint]
        return sorted(found, key=_by_span)

    def models(self) -> dict[str, ModelInfo]:
        """The models of which someone announces blocks, by fingerprint."""
        return {s.model.fingerprint: s.model for s in self if s.model is not None}

    def heads(self) -> list[tuple[ModelInfo, list[ServerInfo]]]:
        """The models that peers make texts of for clients without a part of them, each with these peers."""
        found: dict[str, tuple[ModelInfo, list[ServerInfo]]] = {}
        for info in sorted(self, key=lambda info: info.peer):
            for model in info.heads:
                found.setdefault(model.fingerprint, (model, []))[1].append(info)
        return [found[fingerprint] for fingerprint in sorted(found)]

    def runs(self) -> dict[str, list[ServerInfo]]:
        """Peers that take part in training runs, by the name of the run, both in order."""
        members: dict[str, list[ServerInfo]] = {}
        for info in sorted(self, key=lambda info: info.peer):
            for run in set(info.runs):
                members.setdefault(run, []).append(info)
        return dict(sorted(members.items()))


def _by_span(server: ServerInfo) -> tuple[int, int, PeerId]:
    # Spans compare as well, but ten times as slowly.
    assert server.span is not None
    return server.span.start, server.span.end, server.peer


class Registry(ABC):
    """Soft state with expiry: what each peer announces of itself, signed by that peer.

    A back end is installed under the entry-point group ``swarmcore.registries``, as a
    `swarmcore.registry.choice.RegistryFactory`; `swarmcore.testing.registry_contract` holds it to what is
    said here.
    """

    @abstractmethod
    async def announce(self, info: ServerInfo, ttl: float) -> None:
        """Publish ``info``, replacing what this peer announced before, and keep it published.

        The own view has it when this returns, the others soon after. The registry refreshes it by itself
        (a third of ``ttl`` is usual) until `withdraw` or `close`; from the last refresh it holds for ``ttl``
        seconds, so that a peer that died is out of every view by then. Announcing the same again is no
        change: it makes no new revision. An identity that comes back after a crash supersedes what it had
        announced before.

        Raise `InputError` when ``info.peer`` is not this peer or ``ttl`` is not above 0; nothing is announced
        then.
        """

    @abstractmethod
    async def withdraw(self) -> None:
        """Take back this peer's announcement: others see it leave at once, not at its expiry.

        Harmless when nothing is announced; it may be announced again afterwards.
        """

    @abstractmethod
    def view(self) -> SwarmView:
        """What is known now. Never waits; may lag behind the swarm by a propagation delay.

        A view never changes: ``servers`` refuses to be written to, and what comes later is in another view,
        whose ``revision`` is above this one's. Once `start` has returned, it has what the member that was
        joined through knew. After `close` the last one can still be read.
        """

    @abstractmethod
    def changes(self) -> AsyncIterator[Change]:
        """Every change from the call on, in order, until the registry is closed; then what still waits.

        Changes tell the view: joined, then any number of updates, then left, for each peer. A reader too slow
        for its bounded queue (`swarmcore.registry.changes.READER_BOUND`, which `ChangeFeed` keeps) is not
        dropped: it skips intermediate changes of a peer and gets the latest one.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What its operator should know of this peer's place in the swarm, in words; usually nothing."""
        return ()

    def suspect(self, peer: PeerId) -> None:  # noqa: B027
        """``peer`` does not answer: see whether it is dead, and if so take it out of the view.

        Returns at once and may be called at any time, for any peer. A back end whose view cannot be behind
        the swarm has nothing to do, which is the default.
        """

    def introduce(self, addresses: Sequence[Address]) -> None:  # noqa: B027
        """There may be further members at ``addresses``: join through them, or merge with their swarm.

        Returns at once and may be called at any time; those who do not answer do no harm. The default is to
        do nothing.
        """

    def allow_only(self, peers: Collection[PeerId]) -> None:  # noqa: B027
        """The swarm is closed to all but ``peers`` from now on; what others have announced runs out.

        At first it is closed to all but the ``allowed_peers`` of its node, if these are given. The default is
        to do nothing.
        """

    @abstractmethod
    async def start(self) -> None:
        """Join the swarm. Raise `PeerUnreachableError` when no bootstrap peer answers."""

    @abstractmethod
    async def close(self) -> None:
        """Stop, and end all readers of changes. Harmless when repeated.

        It does not withdraw: what was announced holds for the rest of its ``ttl`` elsewhere.
        """
