"""Which codec a training pass uses on each link: lossless where time allows, fewer bytes where it does not.

After AdaTopK of FusionLLM (arXiv 2410.12707): what goes over a link is compressed in proportion to
the time it takes there, relative to that of the other stages; only links that hold the pipeline up lose any.

What a client does with it, for each tensor of a pass with ``codec="auto"``::

    # before it is sent or asked for
    codec = links.codec(peer, direction, kind, dtype, shape, now, chain=chain.peers)
    # after it went over the link
    links.transferred(peer, direction, encoded_nbytes, seconds, now)
    # once for each pass
    links.computed(peer, kind, shape, done.seconds, now)

``direction`` is ``"up"`` to the peer and ``"down"`` from it; ``kind`` is ``"activations"`` for inputs and
outputs, ``"gradients"`` for those of either. A forward pass is told to `computed` as activations, a backward
pass as gradients. Steps of inference have `swarmcore.routing.step_codec`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import attrs

from swarmcore.types import PeerId
from swarmcore.wire.tensors import ITEM_BYTES

WEIGHT = 0.2
"""Of a new transfer against what was known before: five of them forget two thirds of it."""

SPREAD = 0.1
"""Relative deviation of the sizes from which on a line through them is worth more than their mean."""


@attrs.define
class LinkRate:
    """Fits ``seconds = delay + nbytes / rate`` to the transfers seen, the recent ones counting most.

    The delay has to be kept apart: a small transfer spends most of its time on it, and taken for a low rate
    it would make a fast link look slow for as long as only little is sent over it.
    """

    weight: float = WEIGHT
    _total: float = 0.0
    _nbytes: float = 0.0
    _seconds: float = 0.0
    _square: float = 0.0
    _product: float = 0.0

    def __bool__(self) -> bool:
        """Whether any transfer was seen."""
        return self._total > 0

    def measured(self, nbytes: int, seconds: float) -> None:
        """Take in one transfer. One that cannot be (no bytes, a time that is not finite) is passed over."""
        if nbytes <= 0 or not math.isfinite(seconds) or seconds < 0:
            return
        keep = 1 - self.weight
        self._total = keep * self._total + 1
        self._nbytes = keep * self._nbytes + nbytes
        self._seconds = keep * self._seconds + seconds
        self._square = keep * self._square + float(nbytes) ** 2
        self._product = keep * self._product + nbytes * seconds

    @property
    def seconds_per_byte(self) -> float:
        """0 before the first transfer."""
        if not self:
            return 0.0
        mean, duration = self._nbytes / self._total, self._seconds / self._total
        proportional = duration / mean
        variance = self._square / self._total - mean**2
        if variance < (SPREAD * mean) ** 2:
            return proportional
        slope = (self._product / self._total - mean * duration) / variance
        # Neither end can be: a delay below nothing, or larger transfers that take no longer.
        return min(max(slope, proportional / 10), proportional)

    @property
    def delay(self) -> float:
        """Seconds of a transfer that do not depend on its size."""
        if not self:
            return 0.0
        return max(0.0, (self._seconds - self._nbytes * self.seconds_per_byte) / self._total)

    def seconds(self, nbytes: float) -> float:
        """What a transfer of ``nbytes`` is likely to take."""
        return self.delay + nbytes * self.seconds_per_byte


LinkDirection = Literal["up", "down"]
TensorKind = Literal["activations", "gradients"]

MARGIN = 1.25
"""How far beyond its allowance a transfer has to be, or within it a larger one, before the codec changes."""

PROBE_EVERY = 32
"""Of so many lossy tensors of a link one is sent a rung higher: transfers of another size show its rate."""

FORGET = 600.0
"""Seconds without a transfer after which a link has to be measured anew."""

CAPACITY = 1024


@attrs.frozen
class Rung:
    """One step of a ladder of codecs, from lossless down."""

    codec: str
    bits: float
    """Of each value once encoded, about."""


INT8_BITS = 8.25
"""Of a value in ``int8``: a bfloat16 scale stands for 64 of them."""

LADDERS: Mapping[TensorKind, tuple[Rung, ...]] = {
    "activations": (Rung("int8", INT8_BITS), Rung("mixed4", 5), Rung("mixed3", 4), Rung("mixed2", 3)),
    "gradients": (
        Rung("int8", INT8_BITS),
        Rung("mixed4", 5),
        Rung("mixed3", 4),
        Rung("mixed2", 3),
        Rung("mixed1", 2),
    ),
}
"""Below lossless. They end where a pretrained model no longer learns from what comes through: codecs of the
same sizes that keep only the largest entries destroy its hidden states, which are dense
(docs/training-codec.md)."""


@attrs.define
class _Link:
    rate: LinkRate = attrs.Factory(LinkRate)
    measured: float = -math.inf
    rungs: dict[TensorKind, int] = attrs.Factory(dict)
    lossy: dict[TensorKind, int] = attrs.Factory(dict)
    """Tensors since the last probe."""


class LinkCodec:
    """Chooses codecs by link and direction from measured times. A plain object: ``now`` is passed in.

    A transfer may take ``share`` of the time that the slowest server of the chain computes on the same
    micro-batch: with several of them under way, that hides it. Where raw values fit, they are sent raw. Where
    they do not, the first rung of the ladder that fits is chosen, or the last one. Until a link and its
    servers have been measured, everything is raw. The choice changes only when it is off by `MARGIN`. One
    tensor in `PROBE_EVERY` goes a rung higher: the link may be faster than small transfers show.

    At most ``capacity`` peers are remembered; one more takes the place of the one used longest ago.
    """

    def __init__(
        self,
        *,
        share: float = 1.0,
        ladders: Mapping[TensorKind, Sequence[Rung]] | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        self._share = share
        self._ladders = LADDERS if ladders is None else ladders
        self._capacity = capacity
        self._links: dict[tuple[PeerId, LinkDirection], _Link] = {}
        self._speeds: dict[tuple[PeerId, TensorKind], float] = {}
        self._refused: dict[PeerId, set[str]] = {}
        self._used: dict[PeerId, None] = {}  # in the order of use

    def __repr__(self) -> str:
        lossy = sum(any(link.rungs.values()) for link in self._links.values())
        return f"<LinkCodec {len(self._links)} links, {lossy} of them lossy>"

    def __len__(self) -> int:
        """Peers that are remembered."""
        return len(self._used)

    def codec(
        self,
        peer: PeerId,
        direction: LinkDirection,
        kind: TensorKind,
        dtype: str,
        shape: Sequence[int],
        now: float,
        *,
        chain: Iterable[PeerId] = (),
    ) -> str:
        """The codec for the next tensor of this kind over this link.

        ``chain`` is all peers that the same micro-batch goes through: the slowest of them sets the pace.
        """
        self._touch(peer)
        link = self._link(peer, direction, now)
        count = math.prod(shape)
        rungs = [Rung("raw", 8.0 * ITEM_BYTES[dtype]), *self._ladders[kind]]
        refused = self._refused.get(peer, ())
        rungs = [rung for rung in rungs if rung.codec not in refused and rung.bits <= rungs[0].bits]
        pace = max((self._speeds.get((member, kind), 0.0) for member in {peer, *chain}), default=0.0)
        if not pace or not link.rate:
            return "raw"
        allowed = self._share * pace * count
        before = min(link.rungs.get(kind, 0), len(rungs) - 1)
        seconds = [link.rate.seconds_per_byte * count * rung.bits / 8 for rung in rungs]
        chosen = before
        if seconds[before] > allowed * MARGIN:
            chosen = _first(seconds, allowed)
        elif before:
            chosen = min(before, _first(seconds, allowed / MARGIN))
        link.rungs[kind] = chosen
        link.lossy[kind] = link.lossy.get(kind, 0) + 1 if chosen == before and chosen else 0
        if link.lossy[kind] >= PROBE_EVERY:
            link.lossy[kind] = 0
            chosen -= 1
        return rungs[chosen].codec

    def transferred(
        self, peer: PeerId, direction: LinkDirection, nbytes: int, seconds: float, now: float
    ) -> None:
        """``nbytes``, as encoded, took ``seconds`` over the link, without computation and waiting in queues.

        A latency in it does no harm. Values that cannot be are passed over: some come from the other side.
        """
        self._touch(peer)
        link = self._link(peer, direction, now)
        link.rate.measured(nbytes, seconds)
        link.measured = now

    def computed(
        self, peer: PeerId, kind: TensorKind, shape: Sequence[int], seconds: float, now: float
    ) -> None:
        """``peer`` was at work for ``seconds`` on a pass with hidden states of ``shape``."""
        count = math.prod(shape)
        if not count or not 0 < seconds < math.inf:
            return
        self._touch(peer)
        before = self._speeds.get((peer, kind))
        each = seconds / count
        self._speeds[peer, kind] = each if before is None else before + 0.25 * (each - before)

    def refused(self, peer: PeerId, codec: str) -> bool:
        """``peer`` does not know ``codec``: it is not chosen for it again. Return whether that is news."""
        self._touch(peer)
        refused = self._refused.setdefault(peer, set())
        news = codec != "raw" and codec not in refused
        if news:
            refused.add(codec)
        return news

    def knows(self, peer: PeerId, codec: str) -> bool:
        """Whether ``peer`` has not refused ``codec``."""
        return codec not in self._refused.get(peer, ())

    def forget(self, peer: PeerId) -> None:
        """Harmless when ``peer`` is not known."""
        self._used.pop(peer, None)
        self._refused.pop(peer, None)
        for direction in ("up", "down"):
            self._links.pop((peer, direction), None)
        for kind in ("activations", "gradients"):
            self._speeds.pop((peer, kind), None)

    def _link(self, peer: PeerId, direction: LinkDirection, now: float) -> _Link:
        link = self._links.get((peer, direction))
        if link is None or (link.rate and now - link.measured > FORGET):
            link = self._links[peer, direction] = _Link()
        return link

    def _touch(self, peer: PeerId) -> None:
        self._used.pop(peer, None)
        self._used[peer] = None
        if len(self._used) > self._capacity:
            self.forget(next(iter(self._used)))


def _first(seconds: Collection[float], allowed: float) -> int:
    """Index of the first that is within ``allowed``, or of the last."""
    return next((i for i, each in enumerate(seconds) if each <= allowed), len(seconds) - 1)
