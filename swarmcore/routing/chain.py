"""Which servers a session passes through."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from typing import Protocol

import attrs

from swarmcore.errors import MissingBlocksError, ModelMismatchError
from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span, short


@attrs.frozen
class Stage:
    """One server of a chain, and the blocks it runs there: all that it holds, or a part."""

    server: ServerInfo
    span: Span

    def __str__(self) -> str:
        return f"{short(self.server.peer)} [{self.span}]"


@attrs.frozen
class Chain:
    """Stages whose spans follow each other without gap or overlap."""

    stages: tuple[Stage, ...]

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(stage.server.peer for stage in self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return " → ".join(map(str, self.stages))


class Router(Protocol):
    """Chooses chains. A plain object: the view comes in, the chain goes out."""

    def plan(
        self,
        view: SwarmView,
        model: ModelInfo,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        banned: Collection[PeerId] = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        """The chain for blocks ``span`` of ``model``, for a session that will need ``tokens`` of cache.

        Peers in ``blocked`` are not used; those in ``banned`` only for blocks that nobody else holds.
        ``after`` and ``before`` are the servers between which the chain will stand, None for the client
        itself. Raise `MissingBlocksError` when no servers outside ``blocked`` cover the span,
        `ModelMismatchError` when the only servers of a model of that name hold other weights.
        """


class FewestServers:
    """Covers a span with as few servers as possible; among equals prefers room in the cache, then chance.

    ``allowed``, when given, are the only servers considered.
    """

    def __init__(self, rng: random.Random, *, allowed: Collection[PeerId] | None = None) -> None:
        self._rng = rng
        self._allowed = allowed

    def plan(
        self,
        view: SwarmView,
        model: ModelInfo,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        banned: Collection[PeerId] = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        usable = [
            server
            for server in view.serving(model.fingerprint)
            if server.state == "online"
            and server.peer not in blocked
            and (self._allowed is None or server.peer in self._allowed)
        ]
        trusted = [server for server in usable if server.peer not in banned]
        if not missing_ranges((s.span for s in trusted if s.span), span):
            usable = trusted
        self._rng.shuffle(usable)
        missing = missing_ranges((s.span for s in usable if s.span), span)
        if missing:
            raise _explain_missing(view, model, missing)
        stages = []
        position = span.start
        while position < span.end:
            # Greedy from the left is optimal for interval cover.
            server, reach = max(
                ((s, s.span.end) for s in usable if s.span and position in s.span),
                key=lambda found: (min(found[1], span.end), found[0].cache_tokens_free >= tokens),
            )
            end = min(reach, span.end)
            stages.append(Stage(server, Span(position, end)))
            position = end
        return Chain(tuple(stages))


def missing_ranges(spans: Iterable[Span], whole: Span) -> list[Span]:
    """The parts of ``whole`` that none of ``spans`` covers, in order."""
    missing = []
    position = whole.start
    for span in sorted(spans):
        if span.start > position:
            missing.append(Span(position, min(span.start, whole.end)))
        position = max(position, span.end)
        if position >= whole.end:
            break
    if position < whole.end:
        missing.append(Span(position, whole.end))
    return [span for span in missing if span.start < span.end]


def _explain_missing(
    view: SwarmView, model: ModelInfo, missing: list[Span]
) -> MissingBlocksError | ModelMismatchError:
    if not view.serving(model.fingerprint):
        strangers = [m for m in view.models().values() if m.name == model.name]
        if strangers:
            others = ", ".join(f"{m.name} ({m.fingerprint[:12]})" for m in strangers)
            return ModelMismatchError(
                f"the servers hold other weights than this client: they serve {others}, this client has "
                f"{model.name} ({model.fingerprint[:12]}); load the same files on both sides"
            )
    ranges = [str(span) for span in missing]
    # The name is what servers announce; it need not be where anyone finds the files.
    commands = "; ".join(f"swarmcore serve --model MODEL --blocks {span} --bootstrap …" for span in ranges)
    return MissingBlocksError(
        f"no server holds blocks {', '.join(ranges)} of {model.name}; start: {commands} "
        f"(MODEL: the hub id, folder or GGUF file of {model.name})",
        ranges=ranges,
    )
