"""The shortest path through a graph of servers, from one position to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from swarmcore.routing.graph import ServerGraph
from swarmcore.types import Span

INFINITE = float("inf")

Path = tuple[int, int, "Path | None"]
"""A server's slot, the position where it is entered, and the path to it."""

Arrival = tuple[float, Path | None]
"""Seconds until the hidden states are there, and the path they took."""


@attrs.frozen(kw_only=True)
class Query:
    """What path is wanted. Slots are those of the graph; lists by slot have an entry for each."""

    span: Span
    holders: Sequence[Sequence[int]]
    """The slots that may run each block of the model; those of ``span`` matter."""
    borders: frozenset[int]
    """Positions that nobody may pass without leaving a server."""
    entry: Sequence[float]
    """Seconds of entering a server, on top of getting there, by slot."""
    arrive: Sequence[float]
    """Seconds to a server that is the first, by slot."""
    leave: Mapping[int, float]
    """Seconds from a server that is the last; of those that may be it, by slot."""


def shortest_path(graph: ServerGraph, query: Query, *, max_hops: int | None = None) -> Path | None:
    """The cheapest path, or None where there is none (of at most ``max_hops`` servers)."""
    if max_hops is None:
        layers = [_Layer(graph, query)]
        sources = [layers[0]]
    else:
        layers = [_Layer(graph, query) for _ in range(max_hops)]
        sources = [_Layer(graph, query), *layers[:-1]]  # nothing leads into the first but the beginning
    first = query.span.start
    layers[0].run(first, (INFINITE, None), {s: (query.arrive[s], None) for s in query.holders[first]})
    for layer in layers[1:]:
        layer.run(first, (INFINITE, None), {})
    for position in range(first + 1, query.span.end):
        # From the last layer down: each reads its source as it was before this position.
        for layer, source in zip(reversed(layers), reversed(sources), strict=True):
            hub, exceptions = source.arrivals(position)
            layer.run(position, hub, exceptions)
    best, path = min((layer.end() for layer in layers), key=lambda end: end[0])
    return path if best < INFINITE else None


class _Layer:
    """Least seconds, at the position reached so far, of being on each server: of paths of any length, or of
    those with a certain number of servers."""

    def __init__(self, graph: ServerGraph, query: Query) -> None:
        self._graph = graph
        self._query = query
        self._seconds = [INFINITE] * len(graph.vertices)
        self._paths: list[Path | None] = [None] * len(graph.vertices)
        self._enter = [hub + entry for hub, entry in zip(graph.to_hub, query.entry, strict=True)]
        self._best = INFINITE
        self._nearest = -1
        """The server from which the hub is reached first, in ``_best`` seconds."""
        self._next = -1
        """The server from which it is reached second."""

    def run(self, position: int, hub: Arrival, exceptions: Mapping[int, Arrival]) -> None:
        """Run the block at ``position``, on servers entered here or before.

        Servers not among the ``exceptions`` are entered from the hub.
        """
        seconds, paths, to_hub = self._seconds, self._paths, self._graph.to_hub
        entry, block = self._query.entry, self._graph.block
        slots = self._query.holders[position]
        if position in self._query.borders:
            for slot in slots:
                seconds[slot] = INFINITE
        from_hub, hub_path = hub
        enter = self._enter
        best = second = INFINITE
        nearest = following = -1
        for slot in slots:
            if slot in exceptions:
                entered, path = exceptions[slot]
                entered += entry[slot]
            else:
                entered, path = from_hub + enter[slot], hub_path
            spent = seconds[slot]
            if entered < spent:
                spent = entered
                paths[slot] = (slot, position, path)
            seconds[slot] = spent = spent + block[slot]
            spent += to_hub[slot]
            if spent < best:
                second, following = best, nearest
                best, nearest = spent, slot
            elif spent < second:
                second, following = spent, slot
        self._best, self._nearest, self._next = best, nearest, following

    def arrivals(self, position: int) -> tuple[Arrival, Mapping[int, Arrival]]:
        """When hidden states that leave their server at ``position`` are at the hub, and at servers to which
        the best way is not through the hub."""
        if self._nearest < 0:
            return (INFINITE, None), {}
        graph, best = self._graph, self._best
        seconds, paths = self._seconds, self._paths
        to_hub, nearness = graph.to_hub, graph.nearness
        left = self._query.holders[position - 1]
        found: dict[int, tuple[float, int]] = {}
        for slot in left:
            if seconds[slot] + nearness[slot] < best:
                late = seconds[slot] + to_hub[slot] - best
                for gain, other, delay in graph.shortcuts[slot]:
                    if gain <= late:
                        break
                    there = seconds[slot] + delay
                    if other not in found or there < found[other][0]:
                        found[other] = (there, slot)
        start = seconds[self._nearest]
        around = [
            other
            for other, delay in graph.links[self._nearest].items()
            if start + delay > best + to_hub[other] and graph.holds(other, position)
        ]
        for other in around:
            found[other] = self._detour(other, left)
        exceptions = {other: (there, paths[slot]) for other, (there, slot) in found.items()}
        return (best, paths[self._nearest]), exceptions

    def _detour(self, slot: int, left: Sequence[int]) -> tuple[float, int]:
        """The first to arrive at a server that is farther from the nearest one than through the hub."""
        graph, seconds, following = self._graph, self._seconds, self._next
        if following < 0 or slot in graph.links[following]:
            return min((seconds[other] + graph.delay(other, slot), other) for other in left)
        # Nobody comes through the hub before the next one, nor by a link that is worse than the hub.
        arrivals = [(seconds[following] + graph.to_hub[following] + graph.to_hub[slot], following)]
        for other in graph.linked_to(slot):
            there = seconds[other] + graph.links[other][slot]
            if there < arrivals[0][0] and other in left:
                arrivals.append((there, other))
        return min(arrivals)

    def end(self) -> tuple[float, Path | None]:
        """Seconds and path to the end of the span."""
        slots = self._query.holders[self._query.span.end - 1]
        best = min(slots, key=lambda slot: self._seconds[slot] + self._query.leave[slot])
        return self._seconds[best] + self._query.leave[best], self._paths[best]
