"""Which servers a session passes through."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from swarmcore.types import Numerics, PeerId, ServerInfo, Span, short


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

    @property
    def numerics(self) -> tuple[Numerics | None, ...]:
        """How its servers compute, each way once; None for one that does not say."""
        return tuple(dict.fromkeys(stage.server.computes for stage in self.stages))

    def replacements(self, other: Chain) -> list[tuple[int, int, Chain]]:
        """What to replace to turn this chain into ``other``, which is for the same blocks, from its end to
        its start: the first and the last stage to go, and the stages that come in their place.
        """
        cuts = sorted({s.span.start for s in self.stages} & {s.span.start for s in other.stages})
        found = []
        for start, end in zip(cuts, [*cuts[1:], self.stages[-1].span.end], strict=True):
            old = [i for i, stage in enumerate(self.stages) if start <= stage.span.start < end]
            new = Chain(tuple(stage for stage in other.stages if start <= stage.span.start < end))
            if new.peers != tuple(self.stages[i].server.peer for i in old):
                found.append((old[0], old[-1], new))
        return found[::-1]

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return " → ".join(map(str, self.stages))


def numerics_text(numerics: Iterable[Numerics | None]) -> str:
    """Ways to compute, for people."""
    return ", ".join(str(each or "unknown") for each in numerics)
