"""What drafts have brought."""

from __future__ import annotations

from collections import Counter

import attrs


@attrs.define(eq=False)
class SpeculationCounts:
    """What drafts have brought to a generation so far."""

    steps: int = 0
    """Steps whose rows were received, that of the prompt among them."""
    tokens: int = 0
    """Tokens that they brought."""
    drafted: Counter[str] = attrs.field(factory=Counter)
    """Drafted tokens that were sent to be verified, by who drafted them."""
    accepted: Counter[str] = attrs.field(factory=Counter)
    """Those of them that were right."""
    recalled: int = 0
    """Steps that were called back, since drafts before them were wrong."""

    def add(self, other: SpeculationCounts) -> None:
        """Count what came of another generation, too."""
        self.steps += other.steps
        self.tokens += other.tokens
        self.drafted.update(other.drafted)
        self.accepted.update(other.accepted)
        self.recalled += other.recalled

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were right; None without any."""
        drafted = self.drafted.total()
        return self.accepted.total() / drafted if drafted else None

    def __str__(self) -> str:
        if self.acceptance is None:
            return "nothing was drafted"
        by = ", ".join(f"{name} {self.accepted[name]}/{count}" for name, count in self.drafted.items())
        return f"{self.tokens_per_step:.2f} tokens a step, {self.acceptance:.0%} of drafts accepted ({by})"
