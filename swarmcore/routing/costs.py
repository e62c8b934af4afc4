"""What a chain costs: seconds on the network, in queues and in computation, for one token.

The units of arXiv 2312.08361, section 3.2: an edge of the graph of (server, position) is either entering a
server or one block computed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Literal

import attrs

from swarmcore.routing.chain import Chain, Stage
from swarmcore.types import ModelInfo, PeerId, ServerInfo, short

Phase = Literal["decode", "prefill"]

MAX_RTTS = 16
"""Round trips believed of one server; it is asked for eight."""

SHORTEST_RTT, LONGEST_RTT = 1e-4, 10.0
"""A server that claims to be nearer to others than this is not believed, to be farther is of no interest."""

BYTES_PER_VALUE = 2

RTT_WEIGHT = 0.25
"""Of a new measurement against what was known before: four of them forget two thirds of it."""

MAX_LATENCIES = 4096


class Latencies:
    """Smoothed round trips by peer. A plain object: ``now`` is passed in.

    Holds ``capacity`` peers at most; one more takes the place of the one measured longest ago.
    """

    def __init__(self, *, weight: float = RTT_WEIGHT, capacity: int = MAX_LATENCIES) -> None:
        self._weight = weight
        self._capacity = capacity
        self._times: dict[PeerId, float] = {}  # in the order of measurement
        self._seconds: dict[PeerId, float] = {}
        self.seconds: Mapping[PeerId, float] = MappingProxyType(self._seconds)
        """The smoothed round trip of each peer; changes as measurements come in."""

    def __repr__(self) -> str:
        return f"<Latencies of {len(self._seconds)} peers>"

    def __len__(self) -> int:
        return len(self._seconds)

    def measured(self, peer: PeerId, seconds: float, now: float) -> None:
        """Take in one round trip, measured at ``now``."""
        before = self._seconds.get(peer)
        self._seconds[peer] = seconds if before is None else before + self._weight * (seconds - before)
        self._times.pop(peer, None)
        self._times[peer] = now
        if len(self._times) > self._capacity:
            self.forget(next(iter(self._times)))

    def age(self, peer: PeerId, now: float) -> float:
        """Seconds since ``peer`` was last measured; infinite when it never was."""
        at = self._times.get(peer)
        return float("inf") if at is None else now - at

    def forget(self, peer: PeerId) -> None:
        """Harmless when ``peer`` is not known."""
        self._times.pop(peer, None)
        self._seconds.pop(peer, None)


@attrs.frozen(kw_only=True)
class CostModel:
    """Expected seconds, from what is measured here, what servers announce, and defaults for the rest."""

    rtts: Mapping[PeerId, float] = attrs.field(factory=dict)
    """Round trips measured by this peer; may change between calls."""
    default_rtt: float = 0.05
    """Of a peer that was not measured."""
    default_block_seconds: float = 0.005
    """Of a block, where no server of the model has measured itself."""
    bytes_per_second: float = 12.5e6
    """Rate of a link: 100 Mbit/s."""
    hop_seconds: float = 1e-3
    """Price of every server in a chain: a step is unpacked, waits for its turn, is packed again.

    It also keeps the errors of measured round trips, fractions of a millisecond on one network, from making
    two servers look faster than either of them."""
    turnover: float = 60.0
    """Seconds in which sessions give back as much cache as a server has."""

    def rtt(self, peer: PeerId) -> float:
        """Round trip between this peer and another."""
        return self.rtts.get(peer, self.default_rtt)

    def one_way(
        self, sender: PeerId | None, receiver: PeerId | None, published: float | None = None
    ) -> float:
        """Delay of a message; None is this peer. ``published`` is the round trip that the sender announces.

        Between two servers, where it is not published, it is taken to be that by way of this peer: the
        longest it can be where no link is a detour. A lower guess would make a near server look like a short
        cut to a far one.
        """
        if sender is None or receiver is None:
            peer = sender or receiver
            return self.rtt(peer) / 2 if peer is not None else 0.0
        if published is not None:
            return published / 2
        return (self.rtt(sender) + self.rtt(receiver)) / 2

    def transfer(self, model: ModelInfo, rows: int = 1) -> float:
        """Seconds to put the hidden states of ``rows`` tokens on a link."""
        return rows * model.hidden_size * BYTES_PER_VALUE / self.bytes_per_second

    def room(self, server: ServerInfo, tokens: int) -> float:
        """Expected wait until ``tokens`` of attention cache are free: one `turnover` at most for each time
        that they fill the whole budget."""
        lacking = tokens - server.cache_tokens_free
        return self.turnover * lacking / max(server.cache_tokens, 1) if lacking > 0 else 0.0

    def block_seconds(self, server: ServerInfo, phase: Phase, typical: float | None = None) -> float:
        """Seconds of one token in one block; ``typical``, or the default, where the server has no measure."""
        return measured_block_seconds(server, phase) or typical or self.default_block_seconds

    def typical_block_seconds(self, servers: Iterable[ServerInfo], phase: Phase) -> float:
        """Median over the ``servers`` that have measured themselves."""
        measured = [seconds for server in servers if (seconds := measured_block_seconds(server, phase))]
        return median(measured) if measured else self.default_block_seconds


def measured_block_seconds(server: ServerInfo, phase: Phase) -> float:
    """What the server announces of its speed, for one token and one block; 0 when it was not measured."""
    rate = server.decode_rps if phase == "decode" else server.forward_rps
    return 1 / (rate * len(server.span)) if rate > 0 and server.span else 0.0


def published_rtts(server: ServerInfo) -> dict[PeerId, float]:
    """Round trips between ``server`` and those that may follow it, by its own account."""
    return {
        rtt.peer: min(max(rtt.seconds, SHORTEST_RTT), LONGEST_RTT)
        for rtt in server.rtts[:MAX_RTTS]
        if rtt.seconds >= 0  # which NaN is not
    }


@attrs.frozen
class StageCost:
    """Seconds of one token in one stage."""

    stage: Stage
    network: float
    """From the stage before, or from the client, and the price of a hop."""
    queue: float
    compute: float

    @property
    def seconds(self) -> float:
        return self.network + self.queue + self.compute


@attrs.frozen
class ChainCost:
    """What one token is expected to take through a chain. As text, a table."""

    stages: tuple[StageCost, ...]
    return_seconds: float
    """Seconds from the last stage to the client, or to the stage that follows."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages) + self.return_seconds

    def __str__(self) -> str:
        lines = [f"{'server':<13} {'blocks':>9} {'network':>11} {'queue':>11} {'compute':>11}"]
        for cost in self.stages:
            peer = short(cost.stage.server.peer)
            figures = "".join(f" {_ms(part):>11}" for part in (cost.network, cost.queue, cost.compute))
            lines.append(f"{peer:<13} {cost.stage.span!s:>9}{figures}")
        lines.append(f"{'back':<13} {'':>9} {_ms(self.return_seconds):>11}")
        network = sum(cost.network for cost in self.stages) + self.return_seconds
        queue = sum(cost.queue for cost in self.stages)
        compute = sum(cost.compute for cost in self.stages)
        lines.append(
            f"{'in all':<13} {'':>9} {_ms(network):>11} {_ms(queue):>11} {_ms(compute):>11}   "
            f"{_ms(self.seconds)} a token, {1 / self.seconds:.1f} tokens/s"
        )
        return "\n".join(lines)


def chain_cost(
    costs: CostModel,
    model: ModelInfo,
    chain: Chain,
    *,
    typical: float,
    tokens: int = 0,
    after: PeerId | None = None,
    before: PeerId | None = None,
    published: Mapping[PeerId, float] | None = None,
) -> ChainCost:
    """Seconds of a decode step through ``chain``, which stands between two servers or begins at this peer.

    ``tokens`` are those that there has to be room for in caches, ``published`` the round trips that the
    server ``after`` announces.
    """
    stages = []
    sender, known = after, published or {}
    for stage in chain.stages:
        network = costs.one_way(sender, stage.server.peer, known.get(stage.server.peer))
        network += costs.transfer(model) + costs.hop_seconds
        compute = len(stage.span) * costs.block_seconds(stage.server, "decode", typical)
        queue = stage.server.queue_seconds + costs.room(stage.server, tokens)
        stages.append(StageCost(stage, network, queue, compute))
        sender, known = stage.server.peer, published_rtts(stage.server)
    return_seconds = costs.one_way(sender, before, known.get(before) if before else None)
    return ChainCost(tuple(stages), return_seconds)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
