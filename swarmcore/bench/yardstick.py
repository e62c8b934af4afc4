"""What a transport is compared with: the plainest use of the library that it builds on, in the same run."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import cast

_YARDSTICKS = {
    "tcp": "swarmcore.bench.bare_tls:BareTls",
    "libp2p": "swarmcore.bench.bare_libp2p:BareLibp2p",
}


class Yardstick(ABC):
    """Echoes and swallows messages between two processes, with nothing of swarmcore's in between."""

    name: str

    @abstractmethod
    def serve(self) -> str:
        """Listen on loopback in a thread of its own, until the process ends; return where."""

    @abstractmethod
    def round_trips(self, place: str, size: int, count: int) -> list[float]:
        """Seconds of each of ``count`` echoes of ``size`` bytes, one after the other."""

    @abstractmethod
    def rate(self, place: str, size: int, count: int) -> float:
        """Bytes per second of ``count`` messages of ``size`` bytes, to the receiver's acknowledgement."""


def yardstick_of(scheme: str) -> Yardstick | None:
    """The yardstick for transport ``scheme``; None when it has none."""
    path = _YARDSTICKS.get(scheme)
    if path is None:
        return None
    module, _, name = path.partition(":")
    return cast(Yardstick, getattr(importlib.import_module(module), name)())
