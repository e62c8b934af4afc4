"""The servers of one model as a graph that follows the swarm: what changed is taken in, the rest is kept."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection

import attrs

from swarmcore.registry.base import SwarmView
from swarmcore.routing.costs import CostModel, measured_block_seconds, published_rtts
from swarmcore.types import ModelInfo, PeerId, ServerInfo


@attrs.define
class Vertex:
    """A server. Its costs are those of entering it, of leaving it, and of one block."""

    info: ServerInfo
    start: int
    end: int
    measured: float
    """Seconds of a block by its own measure; 0 without one."""
    published: dict[PeerId, float]
    """Round trips to others, by its own account."""


Shortcut = tuple[float, int, float]
"""Seconds gained over the path by way of the hub, the slot it leads to, and its own seconds one way."""


class ServerGraph:
    """Online servers of ``model``, those that ``admits`` lets in, each at a *slot*: an index into the lists.

    At each position there is a hub, which is where this peer is: by way of it is how long `CostModel.one_way`
    assumes a message takes between two servers that know nothing of each other. So a position costs as many
    edges as it has servers, not their square. Where a round trip is published, an edge of its own takes the
    place of the path by way of the hub.
    """

    def __init__(self, model: ModelInfo, costs: CostModel, admits: Callable[[PeerId], bool]) -> None:
        self.model = model
        self.costs = costs
        self.slots: dict[PeerId, int] = {}
        self.vertices: list[Vertex | None] = []
        self.holders: list[list[int]] = [[] for _ in range(model.blocks)]
        """The slots that hold each block."""
        self.block: list[float] = []
        """Seconds of one block."""
        self.to_hub: list[float] = []
        """Seconds to the hub, and from it."""
        self.shortcuts: list[list[Shortcut]] = []
        """Edges better than by way of the hub, the one that gains most first."""
        self.nearness: list[float] = []
        """Seconds to the hub, less what the best shortcut gains."""
        self.links: list[dict[int, float]] = []
        """All edges of its own: slots and seconds one way. Those worse than by way of the hub stand for
        it no less."""
        self._admits = admits
        self._seen: dict[PeerId, ServerInfo] = {}
        self._free: list[int] = []
        self._mentions: dict[PeerId, dict[int, None]] = {}  # who publishes a round trip to a peer
        self._rtts: dict[PeerId, float] = {}
        self._measured: list[float] = []  # sorted
        self._unmeasured: dict[int, None] = {}
        self._typical = 0.0
        self._stale: dict[int, None] = {}  # whose links have to be worked out again

    def __repr__(self) -> str:
        return f"<ServerGraph {self.model.name} {len(self.slots)} servers>"

    @property
    def typical(self) -> float:
        """Median seconds of a block, over the servers that measured it."""
        if not self._measured:
            return self.costs.default_block_seconds
        middle = len(self._measured) // 2
        if len(self._measured) % 2:
            return self._measured[middle]
        return (self._measured[middle - 1] + self._measured[middle]) / 2

    def follow(self, view: SwarmView) -> None:
        """Take in what is different in ``view`` and in the measured round trips."""
        seen, servers = self._seen, view.servers
        gone = [peer for peer in seen if peer not in servers]
        news = [info for peer, info in servers.items() if seen.get(peer) is not info]
        for peer in gone:
            del seen[peer]
            self._remove(peer)
        for info in news:
            seen[info.peer] = info
            self._put(info)
        self._follow_rtts()
        for slot in self._stale:
            self._link(slot)
        self._stale.clear()
        if self._unmeasured and self._typical != self.typical:
            self._typical = self.typical
            for slot in self._unmeasured:
                self.block[slot] = self._typical

    def info(self, slot: int) -> ServerInfo:
        vertex = self.vertices[slot]
        assert vertex is not None
        return vertex.info

    def delay(self, sender: int, receiver: int) -> float:
        """Seconds one way between the servers at two slots."""
        known = self.links[sender].get(receiver)
        return self.to_hub[sender] + self.to_hub[receiver] if known is None else known

    def linked_to(self, slot: int) -> Collection[int]:
        """The slots that have an edge of their own to ``slot``."""
        return self._mentions.get(self.info(slot).peer, ())

    def holds(self, slot: int, block: int) -> bool:
        vertex = self.vertices[slot]
        return vertex is not None and vertex.start <= block < vertex.end

    def _put(self, info: ServerInfo) -> None:
        span = info.span
        if (
            info.state != "online"
            or info.model is None
            or info.model.fingerprint != self.model.fingerprint
            or span is None
            or span.end > self.model.blocks
            or not self._admits(info.peer)
        ):
            self._remove(info.peer)
            return
        slot = self.slots.get(info.peer)
        before = self.vertices[slot] if slot is not None else None
        if slot is None or before is None or (before.start, before.end) != (span.start, span.end):
            self._remove(info.peer)
            slot = self._take_slot(info.peer)
            for block in span:
                self.holders[block].append(slot)
            before = None
        measured = measured_block_seconds(info, "decode")
        published = published_rtts(info)
        self.vertices[slot] = Vertex(info, span.start, span.end, measured, published)
        if before is None or before.measured != measured:
            if before is not None:
                self._forget_measure(slot, before.measured)
            self._learn_measure(slot, measured)
        if before is None or before.published != published:
            for peer in before.published if before else ():
                self._unmention(peer, slot)
            for peer in published:
                self._mentions.setdefault(peer, {})[slot] = None
            self._stale[slot] = None
        if before is None:
            self._stale.update(self._mentions.get(info.peer, {}))

    def _remove(self, peer: PeerId) -> None:
        slot = self.slots.pop(peer, None)
        if slot is None:
            return
        vertex = self.vertices[slot]
        assert vertex is not None
        self.vertices[slot] = None
        self._free.append(slot)
        for block in range(vertex.start, vertex.end):
            self.holders[block].remove(slot)
        for other in vertex.published:
            self._unmention(other, slot)
        self._forget_measure(slot, vertex.measured)
        self._stale.pop(slot, None)
        self._stale.update(self._mentions.get(peer, {}))

    def _take_slot(self, peer: PeerId) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self.vertices)
            self.vertices.append(None)
            self.block.append(0.0)
            self.to_hub.append(0.0)
            self.nearness.append(0.0)
            self.shortcuts.append([])
            self.links.append({})
        self.slots[peer] = slot
        self.to_hub[slot] = self._rtts.get(peer, self.costs.default_rtt) / 2
        return slot

    def _follow_rtts(self) -> None:
        before, now = self._rtts, self.costs.rtts
        changed = [peer for peer, seconds in now.items() if before.get(peer) != seconds]
        if len(now) != len(before) or changed:
            changed += [peer for peer in before if peer not in now]
            self._rtts = dict(now)
        for peer in changed:
            slot = self.slots.get(peer)
            if slot is not None:
                self.to_hub[slot] = self.costs.rtt(peer) / 2
                self._stale[slot] = None
                self._stale.update(self._mentions.get(peer, {}))

    def _learn_measure(self, slot: int, measured: float) -> None:
        if measured:
            insort(self._measured, measured)
            self.block[slot] = measured
        else:
            self._unmeasured[slot] = None
            self.block[slot] = self._typical  # brought up to date by `follow`

    def _forget_measure(self, slot: int, measured: float) -> None:
        if measured:
            del self._measured[bisect_left(self._measured, measured)]
        else:
            del self._unmeasured[slot]

    def _unmention(self, peer: PeerId, slot: int) -> None:
        publishers = self._mentions[peer]
        del publishers[slot]
        if not publishers:
            del self._mentions[peer]

    def _link(self, slot: int) -> None:
        """Sort the published round trips of one server into shortcuts and detours."""
        vertex = self.vertices[slot]
        assert vertex is not None
        links = {}
        for peer, rtt in vertex.published.items():
            other = self.slots.get(peer)
            if other is not None and other != slot:
                links[other] = rtt / 2
        gains = ((self.to_hub[slot] + self.to_hub[other] - delay, other) for other, delay in links.items())
        shortcuts = sorted(((gain, other, links[other]) for gain, other in gains if gain > 0), reverse=True)
        self.shortcuts[slot] = shortcuts
        self.nearness[slot] = self.to_hub[slot] - max((gain for gain, *_ in shortcuts), default=0.0)
        self.links[slot] = links
