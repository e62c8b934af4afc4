"""What the services on a server's blocks have in common: they check blocks and weights, and they drain."""

from __future__ import annotations

from collections import Counter

from swarmcore.engine.engine import Engine
from swarmcore.errors import ModelMismatchError, ServerDrainingError, SpanError
from swarmcore.server.adapters import AdapterStore
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.forward_backward import OpenBackward, OpenForward
from swarmcore.wire.messages import OpenSession

Opening = OpenSession | OpenForward | OpenBackward
"""The first message of a channel that needs blocks."""


class SpanService:
    """Serves with one engine what needs some of its blocks.

    ``span`` are the blocks that new work may need; a server that moves to other blocks changes it.
    """

    new_work = "work"
    """What it takes no more of while it is draining."""

    def __init__(self, engine: Engine, model: ModelInfo, span: Span, adapters: AdapterStore) -> None:
        self.draining = False
        self.span = span
        self.counters: Counter[str] = Counter()
        self._engine = engine
        self._model = model
        self._adapters = adapters

    def keep_only(self, keep: Span | None) -> None:
        """Refuse new work that needs blocks outside of ``keep``; without it, all new work."""
        if keep is None:
            self.draining = True
        else:
            self.span = keep

    def resume(self, span: Span) -> None:
        """Take new work again, on the blocks ``span``."""
        self.span, self.draining = span, False

    def check_opening(self, opening: Opening) -> Span:
        """The blocks that are asked for.

        Raise `ServerDrainingError` when there is no new work any more, `ModelMismatchError` when other
        weights are meant, `SpanError` for blocks that are not here.
        """
        if self.draining:
            raise ServerDrainingError(f"this server is shutting down and takes no new {self.new_work}")
        if opening.fingerprint != self._model.fingerprint:
            raise ModelMismatchError(
                f"this server holds other weights: it has {self._model.name} "
                f"({self._model.fingerprint[:12]}), the client asked for {opening.fingerprint[:12]}",
                fingerprint=self._model.fingerprint,
            )
        if not self.span.covers(Span(opening.start, opening.end)):
            raise SpanError(
                f"blocks {opening.start}:{opening.end} are not all here: this server holds {self.span}"
            )
        return Span(opening.start, opening.end)
