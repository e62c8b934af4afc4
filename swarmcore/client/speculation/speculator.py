"""What drafts for one model: its drafters, what they have proved to be worth, and what has come of it."""

from __future__ import annotations

from collections.abc import Sequence

from swarmcore.client.speculation.control import SpeculationController
from swarmcore.client.speculation.drafter import DraftSource
from swarmcore.client.speculation.drafting import Drafting
from swarmcore.client.speculation.guarded import GuardedSource
from swarmcore.client.speculation.pool import DrafterPool
from swarmcore.client.speculation.suffix_lookup import SuffixLookup
from swarmcore.generation_settings import Speculation


class Speculator:
    """Makes the drafts for all generations of a model. To be used from one event loop."""

    def __init__(self, vocab_size: int, sources: Sequence[DraftSource] = ()) -> None:
        """``sources`` are drafters besides the lookup of suffixes, which there is always."""
        self.pool = DrafterPool()
        self._vocab_size = vocab_size
        self._controller: SpeculationController | None = None
        """Of the latest generation."""
        self._lookup = GuardedSource(SuffixLookup(), vocab_size)
        self._lookup_earlier = GuardedSource(SuffixLookup(earlier_texts=True), vocab_size)
        self._sources = [GuardedSource(source, vocab_size) for source in sources]

    def __repr__(self) -> str:
        return f"<Speculator {', '.join([self._lookup.name, *(each.name for each in self._sources)])}>"

    def drafting(self, settings: Speculation, *, owner: str = "") -> Drafting:
        """The drafts of one sequence, whose text belongs to ``owner``."""
        lookup = self._lookup_earlier if settings.earlier_texts else self._lookup
        drafters = [source.drafter(owner=owner) for source in (lookup, *self._sources)]
        return Drafting(drafters, self.pool)

    def controller(self, settings: Speculation, *, stages: int) -> SpeculationController:
        """What decides for one generation, over a chain of so many servers."""
        self._controller = SpeculationController(settings, self.pool, stages=stages, before=self._controller)
        return self._controller

    def close(self) -> None:
        """Let go of texts and weights, and end the drafters' threads. Harmless when repeated."""
        for source in (self._lookup, self._lookup_earlier, *self._sources):
            source.close()
