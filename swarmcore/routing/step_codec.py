"""Which codec a step of inference uses on each link: raw where the link is fast, int8 where that is shorter.

A step is one message on each link, so that a link's rate shows only in how much longer a large message takes
than a small one. Each message says when it was sent, by the sender's clock; the receiver subtracts that from
its own. The clocks may differ by anything: only differences of such transits are used.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import attrs

from swarmcore.routing.link_codec import FORGET, INT8_BITS
from swarmcore.types import PeerId
from swarmcore.wire.tensors import ITEM_BYTES

Link = tuple[PeerId | None, PeerId | None]
"""Who sends and who receives; None is this peer."""

STEP_CODECS = ("raw", "int8")

WORTH_SECONDS = 1e-3
"""Rows are sent raw unless another codec makes the step shorter by this, after `MARGIN`."""

MARGIN = 1.25
"""How many times what coding takes has to be saved on the link."""

CODING_SECONDS, CODING_SECONDS_PER_VALUE = 2e-4, 1e-8
"""Encoding and decoding of int8 together, on one core of a slow machine."""

SPREAD_NBYTES = 8192
"""By so many bytes, and twice, the largest message has to exceed the smallest for a rate."""

FRESH = 60.0
"""Seconds for which a transit stands beside others: clocks drift by milliseconds in that time."""

CAPACITY = 4096


@attrs.define
class TransitRate:
    """The rate of one link, from how long messages of different sizes were under way.

    The shortest transit of each size counts, sizes being the same within a factor of two: what waited behind
    other messages took longer.
    """

    seconds_per_byte: float = 0.0
    """0 as long as it is not known."""
    measured: float = -math.inf
    _shortest: dict[int, tuple[int, float, float]] = attrs.Factory(dict)
    """By the size's bits: its bytes, its transit, when."""

    def arrived(self, nbytes: int, transit: float, now: float) -> None:
        """A message of ``nbytes`` came in ``transit`` seconds after it was sent, give or take a constant."""
        size = nbytes.bit_length()
        self._shortest = {key: found for key, found in self._shortest.items() if now - found[2] < FRESH}
        before = self._shortest.get(size)
        # Per byte, as sizes in one class differ.
        if before is None or transit - before[1] < (nbytes - before[0]) * self.seconds_per_byte:
            self._shortest[size] = (nbytes, transit, now)
        small, large = self._shortest[min(self._shortest)], self._shortest[max(self._shortest)]
        more = large[0] - small[0]
        if more >= max(SPREAD_NBYTES, small[0]):
            self.seconds_per_byte = max(large[1] - small[1], 0.0) / more
            self.measured = now


class StepCodecs:
    """Chooses codecs by link from measured transits. A plain object: ``now`` is passed in.

    At most ``capacity`` links are remembered; one more takes the place of the one measured longest ago.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._links: OrderedDict[Link, TransitRate] = OrderedDict()
        self._refusing: OrderedDict[PeerId | None, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<StepCodecs of {len(self._links)} links>"

    def __len__(self) -> int:
        """Links that are remembered."""
        return len(self._links)

    def arrived(self, link: Link, nbytes: int, transit: float, now: float) -> None:
        """As `TransitRate.arrived`. What cannot be is passed over: some of it comes from the other side."""
        if nbytes <= 0 or not math.isfinite(transit):
            return
        self._links.setdefault(link, TransitRate()).arrived(nbytes, transit, now)
        self._links.move_to_end(link)
        if len(self._links) > self._capacity:
            self._links.popitem(last=False)

    def seconds_per_byte(self, link: Link, now: float) -> float:
        """0 where it is not known."""
        rate = self._links.get(link)
        return rate.seconds_per_byte if rate is not None and now - rate.measured < FORGET else 0.0

    def refuse_int8(self, peer: PeerId) -> None:
        """``peer`` does not know the codec: no row goes to it or comes from it in that."""
        self._refusing[peer] = None
        if len(self._refusing) > self._capacity:
            self._refusing.popitem(last=False)

    def takes_int8(self, peer: PeerId | None) -> bool:
        return peer not in self._refusing

    def codec(self, link: Link, dtype: str, shape: Sequence[int], now: float) -> str:
        """Of `STEP_CODECS`, for rows of ``shape`` that are to go over the link in one message.

        A ``dtype`` that is not known, as servers may announce what they like, is taken for one of two bytes.
        """
        if not all(map(self.takes_int8, link)):
            return "raw"
        count = math.prod(shape)
        saved = count * (ITEM_BYTES.get(dtype, 2) - INT8_BITS / 8) * self.seconds_per_byte(link, now)
        coding = CODING_SECONDS + count * CODING_SECONDS_PER_VALUE
        return "int8" if saved > MARGIN * coding + WORTH_SECONDS else "raw"
