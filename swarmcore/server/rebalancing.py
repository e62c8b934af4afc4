"""Looks at the balance of the swarm now and then, and moves the server when that pays."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

from swarmcore.errors import SwarmError
from swarmcore.placement.rebalance import Decision, MoveCost, Rebalancer, look_delay
from swarmcore.registry.base import Registry
from swarmcore.tasks import running, wait_until_set
from swarmcore.types import PeerId, ServerInfo, Span

logger = logging.getLogger(__name__)

SETTLE = 3.0
"""Seconds between announcing a move and deciding on it again: what others announced meanwhile has arrived."""

REACTION = 1.0
"""Seconds, on average, from a change in the swarm to a look, so that several changes make one look."""

REACTION_PER_SERVER = 0.05
"""The same for each server of the swarm, if that is more: in a large one a single change matters little."""


class MovableServer(Protocol):
    """What rebalancing needs of a `BlockServer`."""

    @property
    def registry(self) -> Registry: ...

    @property
    def info(self) -> ServerInfo: ...

    @property
    def move_cost(self) -> MoveCost: ...

    async def announce_target(self, target: Span | None) -> None: ...

    async def move_to(self, span: Span) -> None: ...


class Rebalancing:
    """Drives a `Rebalancer` for one server, at every change and every ``interval`` seconds on average."""

    def __init__(
        self,
        server: MovableServer,
        peer: PeerId,
        interval: float,
        rng: random.Random,
        *,
        balance_quality: float,
    ) -> None:
        self.note = f"placement: it looks at the balance of the swarm about every {interval:.0f} s; not yet"
        """The last decision, in words."""
        self._server = server
        self._interval = interval
        self._rng = rng
        self._peer = peer
        self._rebalancer = Rebalancer(peer, balance_quality=balance_quality)
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Look and move until cancelled; what goes wrong is logged, and tried again at the next look."""
        async with running(self._watch(), "watching for changes of placement"):
            while True:
                await self._wait()
                try:
                    await self.look()
                except Exception:
                    logger.exception("could not rebalance; looking again in about %.0f s", self._interval)

    async def _wait(self) -> None:
        """Until it is time to look."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + look_delay(self._interval, self._rng)
        await wait_until_set(self._changed, deadline - loop.time())
        reaction = max(REACTION, REACTION_PER_SERVER * len(self._server.registry.view()))
        await asyncio.sleep(min(look_delay(reaction, self._rng), max(0.0, deadline - loop.time())))
        self._changed.clear()

    async def _watch(self) -> None:
        """Notice when others are elsewhere, or about to be."""
        places: dict[PeerId, tuple[object, ...]] = {}
        async for change in self._server.registry.changes():
            info = change.info
            place = (change.kind == "left", info.state, info.span, info.target)
            if info.peer != self._peer and places.get(info.peer) != place:
                self._changed.set()
            if change.kind == "left":
                places.pop(info.peer, None)
            else:
                places[info.peer] = place

    async def look(self) -> None:
        """Decide, twice if it comes to a move, and move."""
        server = self._server
        decision = self._rebalancer.look(server.registry.view(), server.info, server.move_cost)
        self._note(decision)
        if decision.target is None:
            return
        try:
            await server.announce_target(decision.target)
            await asyncio.sleep(SETTLE)
            confirmed = self._rebalancer.confirm(
                server.registry.view(), server.info, decision.target, server.move_cost
            )
        except Exception:
            await server.announce_target(None)
            raise
        self._note(confirmed)
        if confirmed.target is None:
            await server.announce_target(None)
            return
        try:
            await server.move_to(confirmed.target)
        except SwarmError as exc:
            self.note = f"placement: could not move to {confirmed.target}: {exc}"
        else:
            self.note = f"placement: moved to {confirmed.target}"

    def _note(self, decision: Decision) -> None:
        self.note = f"placement: {decision}"
        logger.log(logging.INFO if decision.target else logging.DEBUG, "%r: %s", self._server, decision)
