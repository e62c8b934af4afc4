"""The records of the inference, info and ping protocols, and how each is called on the wire."""

from __future__ import annotations

import attrs

from swarmcore.resources import ResourceUse
from swarmcore.types import PeerId, ServerInfo
from swarmcore.wire.failure import Failure
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.framing import wire_tag

INFERENCE = "/swarmcore/inference/1"
INFO = "/swarmcore/info/1"
PING = "/swarmcore/ping/1"
SESSION_STATE = "/swarmcore/session-state/1"


@attrs.frozen
class Hop:
    """One stage of a chain: where a server is, its session there, and the blocks it runs for it."""

    peer: PeerId
    addresses: tuple[str, ...]
    session: str
    start: int
    end: int
    codec: str | None = None
    """How a step's rows are encoded on the way to this stage; None: as `Step.codec` says, which servers of
    earlier versions go by in any case."""


@wire_tag("OpenSession")
@attrs.frozen
class OpenSession:
    """Client to server, first message of a stream: make room for a session, for as long as the stream lives.

    ``session`` is 128 random bits in hex, chosen by the client. It travels only to the servers of its chain,
    and those of them that are ``pushers`` may push steps into the session.
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
    adapter: AdapterName | None = None
    """What the session's steps are computed with besides the frozen weights."""
    pushers: tuple[PeerId, ...] | None = None
    """Who may join the session: the stage before, and a server that hands its caches over. None: whoever
    knows the session's id."""
    names: tuple[bytes, ...] = ()
    """What the client calls the pages that each sequence will begin with: 16 bytes for every 64 tokens, each
    name standing for all that comes before as well. None for no sequence."""


@wire_tag("Admit")
@attrs.frozen
class AllowUpstream:
    """Client to server: from now on ``pushers`` may join the session, and nobody else."""

    pushers: tuple[PeerId, ...]


@wire_tag("SessionOpened")
@attrs.frozen
class SessionOpened:
    """Server to client: the session is granted."""

    cache_tokens_free: int
    next_hop_reachable: bool = True
    """False when the server could not dial ``next_hop``: the client then carries that hop itself."""
    cached: tuple[int, ...] = ()
    """Tokens that each sequence has from the beginning, computed before under the same names: its first step
    may start there, or anywhere below. Empty for none."""
    max_in_flight: int = 0
    """Steps of the session that it takes in at a time, of which it understands `Recall`. 0 for a server that
    does not."""


@wire_tag("NamePages")
@attrs.frozen
class NamePages:
    """Client to server, if it answered ``cached``: what the session's sequences consist of by now, as in
    `OpenSession.names`, so that it is found again when the session has ended."""

    names: tuple[bytes, ...]


@wire_tag("JoinSession")
@attrs.frozen
class JoinSession:
    """Server to server, first message of a stream: steps for ``session`` will follow."""

    session: str


@wire_tag("Step")
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
    """What the last stage sends to the client: ``"all"`` tokens, each sequence's ``"last"`` one, or
    ``"none"``: a `StepOutput` without a tensor."""
    codec: str = "raw"
    """How hidden states are encoded in the answer, and between stages where their `Hop` does not say."""
    deadline: float = 60.0
    """Seconds, from its receipt, in which the step is still of use to the client."""
    sources: tuple[int, ...] = ()
    """Beam search: before anything else, sequence ``i`` becomes a copy of what sequence ``sources[i]`` was.
    Empty for no change."""
    journal: str = "off"
    """What a stage does with its output once it is on its way to the next one: ``"client"`` sends a copy to
    the client, ``"servers"`` keeps it for a `Replay`, ``"off"`` forgets it."""
    settled: int = 0
    """Steps below this number have come home; their answers need not be remembered."""
    attempt: int = 0
    """How often the client has sent the step before; answers repeat it, so that late ones can be told."""
    replay: bool = False
    """Tokens that the session had already: they fill the cache of a stage that is new to it. Not numbered
    with the other steps: repeated, it is computed again."""
    sent: float | None = None
    """When this message left, in seconds by its sender's clock: stages then say so as well, and how long what
    came to them was under way. None for a client that does not ask."""

    @property
    def output_codec(self) -> str:
        """How the stage that gets this step is to encode its output."""
        return (self.chain[0].codec if self.chain else None) or self.codec


@attrs.frozen
class Arrival:
    """A message came in."""

    nbytes: int
    """Of its tensor, as it was encoded."""
    transit: float
    """Seconds from `Step.sent` to then, by the receiver's clock, which is another one: only the difference
    between two of them means anything."""


@wire_tag("Recall")
@attrs.frozen
class Recall:
    """Client to server, if it answered ``max_in_flight``: the steps from ``first`` to ``end``, the end
    excluded, are of no more use.

    The server drops those that it has not computed, also those that come later, and answers none of them. A
    replay is not meant, whatever its number. A step that reorders its sequences is computed all the same, as
    are those before it.
    """

    first: int
    end: int


@wire_tag("StepOutput")
@attrs.frozen
class StepOutput:
    """Server to client: tensor ``hidden`` after ``blocks_done`` (the end of the last span that ran)."""

    step: int
    blocks_done: int
    undelivered: str = ""
    """Why the server could not push to the next hop; the client carries the output there itself."""
    attempt: int = 0
    arrival: Arrival | None = None
    """Of what it is the output of, where the step said when it was sent."""
    sent: float | None = None
    """When this answer left, likewise."""


@wire_tag("StepFailed")
@attrs.frozen
class StepFailed:
    """Server to client: the step was refused or failed here; the session is as it was before the step."""

    step: int
    failure: Failure
    attempt: int = 0


@wire_tag("StepForwarded")
@attrs.frozen
class StepForwarded:
    """Server to client: the step's output is on its way to the next stage.

    With ``journal="client"`` it carries a copy of it as tensor ``hidden``, with ``"servers"`` none. Follows
    the output, never delays it; steps of one stage are told of in their order.
    """

    step: int
    blocks_done: int
    attempt: int = 0
    arrival: Arrival | None = None
    """As in `StepOutput`."""


@wire_tag("Replay")
@attrs.frozen
class Replay:
    """Client to server: send what you kept of your outputs to a stage that is new to the session.

    The server pushes rows ``starts`` to ``starts + lengths`` of its outputs to the first of ``chain``, as a
    `Step` with these numbers and ``replay`` set, as the steps below ``settled`` have left them; the last of
    ``chain`` answers the client. The server answers `StepFailed` itself when it does not have all of these
    rows.
    """

    step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    chain: tuple[Hop, ...]
    codec: str = "raw"
    deadline: float = 60.0
    settled: int = 0


@wire_tag("Draining")
@attrs.frozen
class Draining:
    """Server to client: this server leaves in ``seconds``; move the session, with `TransferKv` or a
    replay."""

    seconds: float


@wire_tag("HandOver")
@attrs.frozen
class TransferKv:
    """Client to server: send the session's attention caches to ``hop``, where a session is open for them.

    No step of the session may be under way. The new server answers the client with `KvTransferred`, this one
    with `KvTransferFailed` when it cannot.
    """

    hop: Hop


@wire_tag("HandOverFailed")
@attrs.frozen
class KvTransferFailed:
    """Server to client: the caches did not get across; the session here is as it was."""

    failure: Failure


@wire_tag("CachePart")
@attrs.frozen
class CachePart:
    """Server to server, after `JoinSession`: attention cache of one sequence, positions ``start`` to
    ``start + count``, as tensors in the executor's own layout."""

    sequence: int
    start: int
    count: int
    last: bool = False
    """Whether the caches of all sequences are complete with this part."""


@wire_tag("CachesTaken")
@attrs.frozen
class KvTransferred:
    """Server to client: the session's caches have arrived; each sequence has so many tokens."""

    lengths: tuple[int, ...]


@wire_tag("AskSession")
@attrs.frozen
class AskSession:
    """Client to server, a call: how far are the steps of my session? To be answered at once."""

    session: str


@wire_tag("SessionState")
@attrs.frozen
class SessionState:
    """Server to client: what there is of a session that the caller has opened."""

    known: bool
    """False when the server has no such session of the caller's (any more)."""
    holds: bool = False
    """Whether steps of it are here: queued, being computed, or on their way out."""
    waits_for_room: bool = False
    """Whether they wait for room in the attention cache."""
    rows: int = 0
    """Rows of the session that were computed so far; grows while a long step computes."""
    work: int = 0
    """Grows with all that the server gets done, for whomever."""


@wire_tag("InfoRequest")
@attrs.frozen
class InfoRequest:
    """Ask a server to describe itself."""


@wire_tag("InfoReply")
@attrs.frozen
class InfoReply:
    """A server's own, current description."""

    server: ServerInfo
    uptime: float
    """Seconds."""
    counters: dict[str, float] = attrs.field(factory=dict)
    """What happened since start, by name: steps, tokens, pushes, refusals, …"""
    notes: tuple[str, ...] = ()
    """What it is about to do and why, for people: its view of where it should be, whom it avoids."""
    resources: tuple[ResourceUse, ...] = ()
    """What remote peers make it hold, and what was refused."""


@wire_tag("Ping")
@attrs.frozen
class Ping:
    payload: bytes = b""


@wire_tag("Pong")
@attrs.frozen
class Pong:
    payload: bytes = b""
