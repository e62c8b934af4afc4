"""Drafters that are told what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from swarmcore.client.speculation.drafter import Drafter, DraftRequest, DraftSource

VOCABULARY = 100


class ScriptedDrafter(Drafter):
    """Proposes what a function of its text and of what is ahead of it says."""

    name = "scripted"

    def __init__(self, script: Callable[[list[int], int], Any]) -> None:
        self.script = script
        self.text: list[int] = []
        self.observed: list[tuple[int, Any]] = []
        self.closed = False
        self.threads: set[int] = set()

    def append(self, tokens: Sequence[int]) -> None:
        self.threads.add(threading.get_ident())
        self.text.extend(tokens)

    def observe(self, start: int, hidden: Any) -> None:
        self.observed.append((start, hidden))

    def propose(self, ahead: Sequence[int], k: int) -> list[int]:
        self.threads.add(threading.get_ident())
        proposal: list[int] = self.script([*self.text, *ahead], k)
        return proposal

    def close(self) -> None:
        self.closed = True


class ScriptedSource(DraftSource):
    """Of drafters that all have one script, in a thread or not."""

    def __init__(
        self, script: Callable[[list[int], int], Any], *, name: str = "scripted", threaded: bool = True
    ) -> None:
        self.script = script
        self.name = name
        self.threaded = threaded
        self.made: list[ScriptedDrafter] = []
        self.batches: list[int] = []
        self.closed = threading.Event()

    def drafter(self, *, owner: str = "") -> ScriptedDrafter:
        self.made.append(ScriptedDrafter(self.script))
        return self.made[-1]

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        self.batches.append(len(requests))
        return super().propose(requests)

    def close(self) -> None:
        self.closed.set()


def counting(text: list[int], k: int) -> list[int]:
    """The numbers that come after the last one."""
    last = text[-1] if text else -1
    return [(last + 1 + step) % VOCABULARY for step in range(k)]
