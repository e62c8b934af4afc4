"""What drafts for one model: its drafters, what they have proved to be worth, and what has come of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        self._latest: SpeculationController | None = None
        self._deciding: list[SpeculationController] = []
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

    @contextmanager
    def deciding(self, settings: Speculation, *, stages: int) -> Iterator[SpeculationController]:
        """What decides for one generation, over a chain of so many servers, as long as it runs.

        Those that run at the same time are taken to share the servers' batches.
        """
        controller = SpeculationController(settings, self.pool, stages=stages, before=self._latest)
        self._latest = controller
        self._deciding.append(controller)
        self._share()
        try:
            yield controller
        finally:
            self._deciding.remove(controller)
            self._share()

    def _share(self) -> None:
        for controller in self._deciding:
            controller.sharing = len(self._deciding)

    def close(self) -> None:
        """Let go of texts and weights, and end the drafters' threads. Harmless when repeated."""
        for source in (self._lookup, self._lookup_earlier, *self._sources):
            source.close()
