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
    refused: int = 0
    """Steps with drafts for which servers had no room: after them nothing was drafted."""
    late: Counter[str] = attrs.field(factory=Counter)
    """Proposals that were not waited for any longer, by whose they were; counted at the end."""
    set_aside: dict[str, str] = attrs.field(factory=dict)
    """Drafters that failed, and were done without from then on, and how they did; known at the end."""

    def add(self, other: SpeculationCounts) -> None:
        """Count what came of another generation, too."""
        self.steps += other.steps
        self.tokens += other.tokens
        self.drafted.update(other.drafted)
        self.accepted.update(other.accepted)
        self.recalled += other.recalled
        self.refused += other.refused
        self.late.update(other.late)
        self.set_aside.update(other.set_aside)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were right; None without any."""
        drafted = self.drafted.total()
        return self.accepted.total() / drafted if drafted else None

    def __str__(self) -> str:
        parts = ["nothing was drafted"]
        if self.acceptance is not None:
            by = ", ".join(f"{name} {self.accepted[name]}/{count}" for name, count in self.drafted.items())
            rate = f"{self.tokens_per_step:.2f} tokens a step"
            parts = [f"{rate}, {self.acceptance:.0%} of drafts accepted ({by})"]
        parts += ["servers had no room for more drafts"] if self.refused else []
        parts += [f"{name} was late {count} times" for name, count in self.late.items()]
        parts += [f"{name} was set aside: {why}" for name, why in self.set_aside.items()]
        return "; ".join(parts)
