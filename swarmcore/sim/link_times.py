"""What the choice of codecs by link is worth: times of a micro-batch over links of different rates.

The calculation behind the AdaTopK table: `LinkCodec` as it is, over links that only have a rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from swarmcore.routing.link_codec import LADDERS, LinkCodec, LinkDirection, TensorKind
from swarmcore.types import PeerId
from swarmcore.wire.tensors import ITEM_BYTES

RATES = (1.0, 10.0, 100.0, 1000.0)
"""Mbit/s."""

KINDS: tuple[TensorKind, ...] = ("activations", "gradients")
DIRECTIONS: tuple[LinkDirection, ...] = ("up", "down")

FIXED = "mixed2"
"""What `LinkTimes.fixed` uses on every link, fast or slow."""

SETTLING = 16
"""Micro-batches that are not counted: the links are measured first."""

COUNTED = 64


@attrs.frozen(kw_only=True)
class MicroBatch:
    """What goes over a link and how long is computed on it."""

    tokens: int = 1024
    hidden_size: int = 4096
    dtype: str = "bfloat16"
    forward_seconds: float = 0.5
    backward_seconds: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.hidden_size

    def seconds(self, kind: TensorKind) -> float:
        """Of computation, on the way forward or back."""
        return self.forward_seconds if kind == "activations" else self.backward_seconds


@attrs.frozen
class LinkTimes:
    """Mean seconds of one micro-batch, forward and back through one server, nothing else under way.

    Four tensors go over the link one after the other: inputs, outputs, and gradients of both. With several
    micro-batches in flight the computation of one hides the transfers of another; the rates of two columns
    then differ by as much or more.
    """

    mbits: float
    """Of the link, each way."""
    raw: float
    fixed: float
    """With `FIXED` on every link."""
    auto: float
    codecs: dict[TensorKind, str]
    """Those that ``auto`` came to."""


def link_times(
    rates: Sequence[float] = RATES, *, work: MicroBatch | None = None, delay: float = 0.03
) -> list[LinkTimes]:
    """The table, a line for each rate in Mbit/s. All links are in one chain; ``delay`` is theirs one way."""
    work = work or MicroBatch()
    codecs = LinkCodec()
    chain = [PeerId(f"{rate:g} Mbit/s") for rate in rates]
    links = [_VirtualLink(peer, rate, delay, work) for peer, rate in zip(chain, rates, strict=True)]
    now = 0.0
    for number in range(SETTLING + COUNTED):
        if number == SETTLING:
            for link in links:
                link.seconds, link.used = 0.0, Counter()
        for link in links:
            now = link.micro_batch(codecs, chain, now)
    return [
        LinkTimes(
            link.rate,
            link.micro_batch_seconds(lambda kind: "raw"),
            link.micro_batch_seconds(lambda kind: FIXED),
            link.seconds / COUNTED,
            {kind: max(_BITS, key=lambda codec: link.used[kind, codec]) for kind in KINDS},
        )
        for link in links
    ]


class _VirtualLink:
    """A link and the server at its other end."""

    def __init__(self, peer: PeerId, rate: float, delay: float, work: MicroBatch) -> None:
        self.peer, self.rate = peer, rate
        self._delay, self._work = delay, work
        self.seconds = 0.0
        """Of all micro-batches."""
        self.used: Counter[tuple[TensorKind, str]] = Counter()

    def micro_batch(self, codecs: LinkCodec, chain: Sequence[PeerId], now: float) -> float:
        """Take one there and back, and tell ``codecs`` about it; return the time when that is done."""
        work, began = self._work, now
        for kind in KINDS:
            for direction in DIRECTIONS:
                codec = codecs.codec(self.peer, direction, kind, work.dtype, work.shape, now, chain=chain)
                seconds = self._transfer(codec)
                now += seconds
                codecs.transferred(self.peer, direction, self._nbytes(codec), seconds, now)
                self.used[kind, codec] += 1
            now += work.seconds(kind)
            codecs.computed(self.peer, kind, work.shape, work.seconds(kind), now)
        self.seconds += now - began
        return now

    def micro_batch_seconds(self, codec: Callable[[TensorKind], str]) -> float:
        """The same with codecs that are given."""
        return sum(len(DIRECTIONS) * self._transfer(codec(kind)) + self._work.seconds(kind) for kind in KINDS)

    def _transfer(self, codec: str) -> float:
        return self._delay + 8 * self._nbytes(codec) / (self.rate * 1e6)

    def _nbytes(self, codec: str) -> int:
        bits = _BITS[codec] or 8.0 * ITEM_BYTES[self._work.dtype]
        return int(math.prod(self._work.shape) * bits / 8)


_BITS = {"raw": 0.0} | {rung.codec: rung.bits for ladder in LADDERS.values() for rung in ladder}
"""Of each value; raw ones are as large as their dtype."""
