"""What a remote model needs of a session; `swarmcore.client.session.session` has the one over the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from swarmcore.client.adapters import AdapterWeights
from swarmcore.routing.chain import Chain
from swarmcore.session.steps import SentStep
from swarmcore.types import Numerics
from swarmcore.wire.tensors import Tensor

Reply = Literal["all", "last"]
"""Of which new tokens a step gives rows: all, or the last of each sequence."""


class RemoteSession(Protocol):
    """Runs hidden states through all blocks of a model; the attention caches are elsewhere."""

    @property
    def sequences(self) -> int: ...

    @property
    def chain(self) -> Chain:
        """The servers that the session passes through now."""

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How its servers have computed so far, each way once."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens of each sequence in the remote caches."""

    @property
    def cached(self) -> tuple[int, ...]:
        """Tokens of each sequence that servers had computed before, of those that the first step brought."""

    async def step(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: Reply = "last",
    ) -> Tensor:
        """Run ``hidden``, ``[sum(lengths), hidden size]``: the sequences' new tokens, one after the other.

        With ``sources``, sequence ``i`` first becomes a copy of sequence ``sources[i]``. A length of 0 leaves
        a sequence alone; a start below its position rolls it back. The result has one row for each sequence
        of length above 0 (``"last"``), or one for every token (``"all"``).
        """

    @property
    def max_in_flight(self) -> int:
        """Steps that may be under way at a time, 1 or more."""

    async def send(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: Reply = "last",
    ) -> SentStep:
        """As `step`, behind the steps that are under way; `receive` gives the result."""

    async def receive(self, step: SentStep) -> Tensor:
        """What comes of a step that was sent. When it fails, those sent behind it have failed as well."""

    async def recall(self, step: SentStep) -> None:
        """Give up a step that was not received, and all that were sent behind it."""

    async def name_pages(self, tokens: Sequence[Sequence[int]]) -> None:
        """Say what the sequences consist of by now, for sessions to come; of no effect where none ask."""

    async def close(self) -> None:
        """Free the remote caches. Harmless when repeated."""


class SessionOpener(Protocol):
    """Opens sessions of one model."""

    async def __call__(
        self,
        *,
        sequences: int,
        max_tokens: int,
        adapter: AdapterWeights | None = None,
        prompts: Sequence[Sequence[int]] = (),
        namespace: str = "",
    ) -> RemoteSession:
        """``max_tokens`` is what each sequence is expected to grow to; it is no limit.

        ``adapter`` is what its steps are computed with besides the frozen weights. ``prompts`` are the tokens
        that the first step will bring, where they are known: what servers have of them from earlier sessions
        of the ``namespace`` need not be computed.
        """
