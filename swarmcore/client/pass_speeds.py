"""How fast servers are at passes: as measured, and as they announce until then. A plain object."""

from __future__ import annotations

import math
import statistics
from typing import Literal

from swarmcore.types import PeerId, ServerInfo

Kind = Literal["forward", "backward"]
Work = Literal["forward", "backward", "both"]
"""What a server will do on a micro-batch: a pass, or one there and one back."""

SMOOTHING = 0.2
"""Weight of a pass among those that went before."""

BACKWARD = 3.0
"""What a backward pass takes in forward passes, one to compute the activations again, until it is known."""

CAPACITY = 2048
"""Speeds that are remembered; one more takes the place of the one that was measured longest ago."""


class PassSpeeds:
    """Seconds of a token through a block, by server, forward and backward apart.

    What servers announce counts beside what is measured of others as far as announcements are right on the
    whole: all are multiplied by what the median of the measured ones is off by.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[PeerId, Kind], float] = {}
        self._announced: dict[PeerId, float] = {}

    def __len__(self) -> int:
        """Servers that have been measured."""
        return len({peer for peer, _ in self._seconds})

    def worked(self, server: ServerInfo, kind: Kind, tokens: int, blocks: int, seconds: float) -> None:
        """``server`` was at work on a pass of ``tokens`` through ``blocks`` for so long.

        Values that cannot be are passed over: they come from the other side.
        """
        if not 0 < seconds < math.inf or not tokens or not blocks:
            return
        now = seconds / (tokens * blocks)
        before = self._seconds.pop((server.peer, kind), now)
        self._seconds[server.peer, kind] = before + SMOOTHING * (now - before)
        if announced := announced_seconds(server):
            self._announced[server.peer] = announced
        if len(self._seconds) > CAPACITY:
            oldest, _ = next(iter(self._seconds))
            self._seconds.pop((oldest, "forward"), None)
            self._seconds.pop((oldest, "backward"), None)
            self._announced.pop(oldest, None)

    def seconds(self, servers: list[ServerInfo], work: Work) -> dict[PeerId, float]:
        """Seconds that each of ``servers`` needs for ``work`` on a token, for each block.

        Those of which nothing is known count like the slowest of the others.
        """
        ratio, error = self._ratio(), self._error()
        found: dict[PeerId, float] = {}
        for server in servers:
            forward = self._seconds.get((server.peer, "forward"))
            back = self._seconds.get((server.peer, "backward"))
            if forward is None:
                forward = back / ratio if back is not None else announced_seconds(server) * error
            if back is None:
                back = forward * ratio
            found[server.peer] = {"forward": forward, "backward": back, "both": forward + back}[work]
        slowest = max(found.values(), default=0.0) or 1.0
        return {peer: seconds or slowest for peer, seconds in found.items()}

    def _ratio(self) -> float:
        """What a backward pass takes, in forward passes."""
        both = [
            back / forward
            for (peer, kind), back in self._seconds.items()
            if kind == "backward" and (forward := self._seconds.get((peer, "forward")))
        ]
        return statistics.median(both) if both else BACKWARD

    def _error(self) -> float:
        """What a forward pass really takes, in what is announced."""
        errors = [
            seconds / self._announced[peer]
            for (peer, kind), seconds in self._seconds.items()
            if kind == "forward" and peer in self._announced
        ]
        return statistics.median(errors) if errors else 1.0


def announced_seconds(server: ServerInfo) -> float:
    """Of a token through a block on its way forward, as ``server`` says; 0 when it says nothing."""
    rate = server.forward_rps or server.throughput
    return 1 / (rate * len(server.span)) if rate > 0 and server.span else 0.0
