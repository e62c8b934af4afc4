"""The records of the inference, info and ping protocols, and how each is called on the wire."""

from __future__ import annotations

import attrs

from swarmcore.types import PeerId, ServerInfo
from swarmcore.wire.failure import Failure

INFERENCE = "/swarmcore/inference/1"
INFO = "/swarmcore/info/1"
PING = "/swarmcore/ping/1"


@attrs.frozen
class Hop:
    """One stage of a chain: where a server is, its session there, and the blocks it runs for it."""

    peer: PeerId
    addresses: tuple[str, ...]
    session: str
    start: int
    end: int


@attrs.frozen
class OpenSession:
    """Client to server, first message of a stream: make room for a session, for as long as the stream lives.

    ``session`` is 128 random bits in hex, chosen by the client. Who knows it may push steps into the session,
    so it travels only to the servers of its chain.
    """

    session: str
    fingerprint: str
    start: int
    end: int
    sequences: int
    """Sequences (rows of a batch) in the session."""
    tokens: int = 0
    """Cache tokens, over all sequences, to have free before the session is granted."""
    next_hop: Hop | None = None
    """Whom the server will push to, so that it can dial ahead of the first step."""


@attrs.frozen
class SessionOpened:
    """Server to client: the session is granted."""

    cache_tokens_free: int
    next_hop_reachable: bool = True
    """False when the server could not dial ``next_hop``: the client then carries that hop itself."""


@attrs.frozen
class JoinSession:
    """Server to server, first message of a stream: steps for ``session`` will follow."""

    session: str


@attrs.frozen
class Step:
    """Run new tokens through the span.

    Tensor ``hidden`` is ``[sum(lengths), hidden size]``, the sequences' new tokens one after the other.
    ``starts`` and ``lengths`` have one entry for each sequence of the session; a length of 0 leaves the
    sequence alone. A start below the sequence's cached length first rolls its cache back to there; a start
    above it is refused. A repeated ``step`` is answered from memory.
    """

    step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    chain: tuple[Hop, ...] = ()
    """The stages that follow; empty for the last one, which answers the client."""
    reply: str = "all"
    """What the last stage sends to the client: ``"all"`` tokens or each sequence's ``"last"`` one."""
    codec: str = "raw"
    """How hidden states are encoded between stages and in the answer."""
    deadline: float = 60.0
    """Seconds, from its receipt, in which the step is still of use to the client."""


@attrs.frozen
class StepOutput:
    """Server to client: tensor ``hidden`` after ``blocks_done`` (the end of the last span that ran)."""

    step: int
    blocks_done: int
    undelivered: str = ""
    """Why the server could not push to the next hop; the client carries the output there itself."""


@attrs.frozen
class StepFailed:
    """Server to client: the step was refused or failed here; the session is as it was before the step."""

    step: int
    failure: Failure


@attrs.frozen
class InfoRequest:
    """Ask a server to describe itself."""


@attrs.frozen
class InfoReply:
    """A server's own, current description."""

    server: ServerInfo
    uptime: float
    """Seconds."""
    counters: dict[str, float] = attrs.field(factory=dict)
    """What happened since start, by name: steps, tokens, pushes, refusals, …"""


@attrs.frozen
class Ping:
    payload: bytes = b""


@attrs.frozen
class Pong:
    payload: bytes = b""
