"""Records that every floor shares: peer ids, addresses, spans, what a server announces."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NewType

import attrs

from swarmcore.errors import AddressError, InputError, SpanError

PeerId = NewType("PeerId", str)
"""An Ed25519 public key in libp2p's text form (``12D3Koo…``), the same on every transport."""

ServerState = Literal["joining", "online", "draining"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, in all)``, from any thread but never from two at once.

Bytes are counted where nothing else is said; 0 in all means that the total is not known. What it raises
ends the work.
"""

_PEER_ID = re.compile(r"12D3Koo[1-9A-HJ-NP-Za-km-z]{45}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_LOOPBACK = re.compile(r"((wss?:)?//|/ip[46]/)(127\.|\[::1\]|::1/|localhost:)")


def short(peer: str) -> str:
    """A peer id as people read it in logs and tables: ``12D3…a1b2c3``."""
    return f"{peer[:4]}…{peer[-6:]}" if len(peer) > 12 else peer


@attrs.frozen
class Address:
    """Where a peer can be dialled: ``scheme:location/<peer id>``.

    ``scheme`` names the transport, ``location`` is that transport's own business.
    """

    scheme: str
    location: str
    peer: PeerId

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raise `AddressError` when the scheme or the peer id at the end is missing."""
        scheme, colon, rest = url.partition(":")
        if not colon or not _SCHEME.fullmatch(scheme):
            raise AddressError(
                f"address {url!r} has no transport scheme; expected tcp://host:port/<peer id>, "
                f"or libp2p: before a multiaddr"
            )
        location, _, peer = rest.rpartition("/")
        if not _PEER_ID.fullmatch(peer):
            raise AddressError(
                f"address {url!r} does not end in a peer id; copy the whole address the server printed, "
                f"such as tcp://host:port/12D3Koo…"
            )
        return cls(scheme, location, PeerId(peer))

    @classmethod
    def parse_all(cls, urls: tuple[str, ...]) -> tuple[Address, ...]:
        """Those of ``urls`` that can be read: peers of other versions may announce more."""
        return _parsed(urls)

    @property
    def on_loopback(self) -> bool:
        """Whether it leads nowhere but to the machine that dials it."""
        return _LOOPBACK.match(self.location) is not None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.location}/{self.peer}"


@lru_cache(maxsize=4096)
def _parsed(urls: tuple[str, ...]) -> tuple[Address, ...]:
    addresses = []
    for url in urls:
        with contextlib.suppress(AddressError):
            addresses.append(Address.parse(url))
    return tuple(addresses)


@attrs.frozen(order=True)
class Span:
    """Consecutive blocks ``start`` to ``end``, the end excluded."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``"0:10"``. Raise `SpanError` unless 0 <= start < end."""
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if not match or int(match[1]) >= int(match[2]):
            raise SpanError(
                f"block range {text!r} is not of the form START:END with START < END, such as 0:10"
            )
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def covers(self, other: Span) -> bool:
        """Whether ``other`` has blocks, and all of them are in this one."""
        return self.start <= other.start < other.end <= self.end

    def overlap(self, other: Span) -> Span | None:
        """The blocks that are in both; None when there are none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None

    def split(self, parts: int) -> list[Span]:
        """All its blocks, in so many spans of about the same length."""
        bounds = [self.start + number * len(self) // parts for number in range(parts + 1)]
        return [Span(start, end) for start, end in pairwise(bounds)]

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@attrs.frozen
class ModelInfo:
    """Which model a server holds blocks of."""

    name: str
    """What people call it; not trusted to identify the weights."""
    fingerprint: str
    """Hash of config and weights: equal fingerprints mean equal tensors."""
    blocks: int
    """Number of transformer blocks in the whole model."""
    hidden_size: int
    """Width of the hidden states that pass between blocks."""
    source: str = attrs.field(default="", eq=False)
    """Where others find it, as whoever announces it was told: ``pypi:PACKAGE`` or a hub id, empty for files
    of its own. A claim like the name; see `swarmcore.sources`."""

    @property
    def span(self) -> Span:
        """All of its blocks."""
        return Span(0, self.blocks)


SHORT_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""What dtypes of hidden states are called in tables and in `Numerics`."""

_NUMERICS_PART = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,23}")


def _check_numerics_part(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not _NUMERICS_PART.fullmatch(value):
        raise InputError(
            f"{attribute.name} of a server's numerics is {value[:32]!r}; it has to be 1 to 24 small letters, "
            f"digits and any of _ . + -"
        )


@attrs.frozen
class Numerics:
    """How a server computes, in what results depend on. Servers of equal numerics give the same tokens but
    at near ties; between others they may differ sooner.

    As text, ``torch/bf16``, parts at the end are left out that are like the one before them. Raise
    `InputError` for a part that is not 1 to 24 small letters, digits and ``_.+-``.
    """

    executor: str = attrs.field(validator=_check_numerics_part)
    """The back end: ``"torch"``, ``"ggml"``."""
    weights: str = attrs.field(validator=_check_numerics_part)
    """What the blocks' weights are kept in: ``"bf16"``, ``"nf4"``, ``"q4_k_m"``; the same for every block."""
    dtype: str = attrs.field(validator=_check_numerics_part)
    """What is computed in between the products, short: ``"bf16"``."""
    cache_dtype: str = attrs.field(validator=_check_numerics_part)
    """What keys and values are cached in: ``"bf16"``, ``"int8"``."""

    @classmethod
    def parse(cls, text: str) -> Numerics:
        """Read ``"torch/bf16"`` or ``"ggml/q4_k_m/f32/f16"``. Raise `InputError` for anything else."""
        return _parsed_numerics(text)

    def __str__(self) -> str:
        parts = [self.executor, self.weights, self.dtype, self.cache_dtype]
        while len(parts) > 2 and parts[-1] == parts[-2]:
            parts.pop()
        return "/".join(parts)


@lru_cache(maxsize=256)
def _parsed_numerics(text: str) -> Numerics:
    executor, *rest = text.split("/", 4)
    if not 1 <= len(rest) <= 3:
        raise InputError(
            f"{text[:100]!r} names no numerics: expected such as torch/bf16 or ggml/q4_k_m/f32/f16"
        )
    return Numerics(executor, *rest, *[rest[-1]] * (3 - len(rest)))


TRAINING, ADAPTERS = "training", "adapters"
"""What a server may be able to do besides inference: forward and backward passes of batches; steps and passes
with a client's adapter."""


@attrs.frozen
class Rtt:
    """A measured round trip to another peer."""

    peer: PeerId
    seconds: float


@attrs.frozen
class ServerInfo:
    """What a peer announces of itself. A peer without blocks (a bootstrap peer) has no model and no span."""

    peer: PeerId
    addresses: tuple[str, ...]
    state: ServerState = "online"
    model: ModelInfo | None = None
    span: Span | None = None
    dtype: str = ""
    cache_tokens: int = 0
    """Attention cache budget, in tokens of this server's whole span."""
    cache_tokens_free: int = 0
    sessions: int = 0
    decode_rps: float = 0.0
    """Measured decode steps per second through the whole span; 0 when not measured."""
    forward_rps: float = 0.0
    """Measured prefill tokens per second through the whole span; 0 when not measured."""
    throughput: float = 0.0
    """Tokens per second that it can carry through its whole span for all sessions together, the least of
    computation and network; what placement weighs. 0 when not known."""
    queue_seconds: float = 0.0
    """How long a step waits here before it is computed, on average of late."""
    rtts: tuple[Rtt, ...] = ()
    """Round trips to servers that may follow it in a chain."""
    target: Span | None = None
    """Blocks that it is moving to; ``span`` is what it serves meanwhile. Counts for placement, not for
    routing."""
    pinned: bool = False
    """It stays on its blocks, as it was told, whatever the swarm needs."""
    pass_tokens: int = 0
    """Most tokens of one batch that it runs forward or back for others; 0 when it runs none."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that it serves."""
    runs: tuple[str, ...] = ()
    """Names of the training runs that it takes part in."""
    heads: tuple[ModelInfo, ...] = ()
    """Models that it generates text of for clients that have no part of them."""
    incarnation: int = 0
    """Differs from one start of the server to the next: with another number, all is forgiven."""
    public_name: str = ""
    version: str = ""
    numerics: str = ""
    """How it computes, `Numerics` as text; empty for servers of earlier versions, see `computes`."""
    capabilities: tuple[str, ...] = (TRAINING, ADAPTERS)
    """What it can do besides inference; servers of earlier versions can do both."""
    start_step: int = 1
    """Its span begins at a multiple of this many blocks, wherever it moves."""

    @property
    def computes(self) -> Numerics | None:
        """Its ``numerics``, parsed; None for a peer without blocks. Those of earlier versions run torch, with
        weights and caches in their dtype."""
        if self.span is None or not (self.numerics or self.dtype):
            return None
        return Numerics.parse(self.numerics or f"torch/{SHORT_DTYPES.get(self.dtype, 'unknown')}")

    @property
    def dialable(self) -> tuple[Address, ...]:
        """Its ``addresses``, parsed; a node takes those that it has a transport for, the best one first."""
        return Address.parse_all(self.addresses)

    def __str__(self) -> str:
        held = f"blocks {self.span}" if self.span else "no blocks"
        return f"{short(self.peer)} {self.state} {held}"


JsonDict = dict[str, Any]
