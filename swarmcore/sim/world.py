"""A simulated swarm: its clock, network and model, and the peers that live there."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

from swarmcore.identity import Identity
from swarmcore.sim.costs import MeasuredModel
from swarmcore.sim.hosts import Geography
from swarmcore.sim.model import SimModel
from swarmcore.sim.network import SimNetwork
from swarmcore.sim.stream import Scale
from swarmcore.sim.trace import Trace
from swarmcore.testing import clock
from swarmcore.types import PeerId

T = TypeVar("T")

EPOCH = 1_700_000_000.0
"""What simulated wall clocks show at loop time 0, in seconds since 1970."""

_STATE_BYTES = 8
_GARBAGE = 200_000


class Participant(Protocol):
    """A peer that lives in a world."""

    async def stop_registry(self) -> None:
        """Begin nothing more."""

    async def end(self) -> None:
        """Close what is open."""


class World:
    """All that peers share. Whatever is drawn in it follows from ``seed``, by name."""

    def __init__(
        self,
        seed: int | str,
        geography: Geography,
        measured: MeasuredModel,
        model: SimModel | None = None,
    ) -> None:
        """``model`` is the one that ``measured`` stands for, unless its rows have to be larger."""
        self.seed = seed
        self.measured = measured
        self.model = model or SimModel(measured.name, measured.blocks)
        self.trace = Trace()
        self.network = SimNetwork(
            geography,
            self.rng("network"),
            trace=self.trace,
            scale=Scale(measured.row_bytes / self.model.row_bytes, measured.cache_bytes / _STATE_BYTES),
        )
        self.problems: list[str] = []
        """What should not have happened, tasks that failed included."""
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._names: dict[PeerId, str] = {}
        self._participants: list[Participant] = []
        self._freezes = False
        """Whether it may keep the garbage collector off what is here."""

    def rng(self, name: str) -> random.Random:
        """The source of randomness called ``name``: what one draws leaves the others alone."""
        return random.Random(f"{self.seed}/{name}")

    def identity(self, name: str) -> Identity:
        """The identity of the peer called ``name``."""
        identity = Identity.from_seed(blake2b(f"{self.seed}/{name}".encode(), digest_size=32).digest())
        self._names[identity.peer] = name
        return identity

    def name_of(self, peer: PeerId) -> str:
        """What a peer is called here."""
        return self._names[peer]

    def now(self) -> float:
        """Seconds since the start."""
        return asyncio.get_running_loop().time()

    def wall_clock(self) -> float:
        """Seconds since 1970, as every peer sees them."""
        return EPOCH + self.now()

    def note(self, text: str) -> None:
        """Put an event into the trace."""
        self.trace.note(self.now(), text)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run ``work`` in a task of its own. What it raises is one of the `problems`."""
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.problems.append(f"{task.get_name()}: {type(error).__name__}: {error}")

    async def stop_tasks(self) -> None:
        """Cancel the tasks of `start`, and wait for them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def add_participant(self, participant: Participant) -> None:
        """Have a peer cleared away at the end."""
        self._participants.append(participant)

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run ``main`` to its end on a clock of its own, then end everybody who lives here."""
        # A large world holds millions of objects for long: to look through them all often is of no use.
        thresholds = gc.get_threshold()
        # What whoever runs this has frozen before cannot be told from what is frozen here: it stays frozen.
        self._freezes = gc.get_freeze_count() == 0
        gc.set_threshold(_GARBAGE, *thresholds[1:])
        try:
            return clock.run(self._run_to_end(main()), horizon=float("inf"), threads=False)
        finally:
            if self._freezes:
                gc.unfreeze()
            gc.set_threshold(*thresholds)

    def freeze_garbage(self) -> None:
        """Whoever is here stays for long: garbage is looked for elsewhere from now on."""
        if self._freezes:
            gc.freeze()

    async def _run_to_end(self, main: Coroutine[Any, Any, T]) -> T:
        try:
            return await main
        finally:
            self.trace.seal()
            await self.stop_tasks()  # before what they talk to ends, which is no problem of theirs
            # All gossip ends before the first of those that gossip goes away.
            for participant in self._participants:
                await participant.stop_registry()
            for participant in self._participants:
                await participant.end()

    def __repr__(self) -> str:
        return f"<World {self.seed} {self.network!r} {self.trace!r}>"
