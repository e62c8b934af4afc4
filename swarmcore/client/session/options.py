"""The options of a session, and what it reports of each failover."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from swarmcore.session.move_policy import MoveLimits
from swarmcore.session.steps import JournalMode


@attrs.frozen(kw_only=True)
class Failover:
    """Stages of a session were replaced, after a failure or for better ones, and the session went on."""

    lost: str
    """The servers that left the chain, and their blocks."""
    reason: str
    took_over: str
    """The servers that came in their place; the same ones when they could go on."""
    tokens: int
    """Tokens, over all sequences, whose caches were rebuilt."""
    how: str
    """``"replayed"`` from the journal, or ``"handed over"`` by a server that leaves."""
    seconds: float
    """From the failure's being noticed until the caches were there again."""
    numerics: str = ""
    """From which numerics to which, where nobody was left who computes as the lost servers did: the text may
    be another one than without the failover, from a near tie on."""

    def __str__(self) -> str:
        changed = f", by other numerics: {self.numerics}" if self.numerics else ""
        return (
            f"{self.lost} left the session ({self.reason}); {self.took_over} took over, {self.tokens} tokens "
            f"{self.how} in {self.seconds:.2f} s{changed}"
        )


@attrs.frozen(kw_only=True)
class SessionOptions:
    """How a session travels."""

    chunk_rows: int = 256
    """Longest piece, in tokens over all sequences, in which a long prompt goes through the chain."""
    codec: str = "raw"
    """How hidden states are encoded on the way: ``"raw"``; ``"int8"``, half of bfloat16's bytes and 1 to 2 %
    off; either with ``"+zstd"``, which is lossless and pays on links under some 50 MB/s; or ``"auto"``: raw,
    but int8 on each link that was measured to be so slow that this makes the step shorter."""
    open_timeout: float = 40.0
    """Seconds to wait for every server to grant the session."""
    step_timeout: float = 60.0
    """Seconds without any progress of a step after which the stage where it is stuck counts as lost."""
    journal: JournalMode = "client"
    """Who keeps what lost stages are rebuilt from: the ``"client"``, to which servers send copies of their
    outputs when they have time; the ``"servers"``, each its own outputs, for a client whose downlink is slow;
    or nobody (``"off"``): a failure then ends the session."""
    prefix_cache: bool = True
    """Whether a session begins with what servers have kept of its prompt from earlier ones, and has them keep
    what it consists of."""
    patience: float = 60.0
    """Seconds to wait for a server that holds the blocks of one that was lost."""
    moves: MoveLimits | None = attrs.field(factory=MoveLimits)
    """How much better another chain has to be for a live session to move to it; None: it never does."""
    on_failover: Callable[[Failover], None] | None = None
    """Told of every failover, which is then logged as information rather than as a warning."""
