"""Looks at the balance of the swarm now and then, and moves the server when that pays."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from swarmcore.errors import SwarmError
from swarmcore.placement.rebalance import Decision, Rebalancer, look_delay

if TYPE_CHECKING:
    from swarmcore.server.block_server import BlockServer

logger = logging.getLogger(__name__)

SETTLE = 5.0
"""Seconds between announcing a move and deciding on it again: what others announced meanwhile has arrived."""


class Rebalancing:
    """Drives a `Rebalancer` for one server; ``interval`` is in seconds, on average."""

    def __init__(self, server: BlockServer, interval: float, rng: random.Random) -> None:
        self.note = f"placement: it looks at the balance of the swarm about every {interval:.0f} s; not yet"
        """The last decision, in words."""
        self._server = server
        self._interval = interval
        self._rng = rng
        self._rebalancer = Rebalancer(server.node.peer, rng, balance_quality=server.config.balance_quality)

    async def run(self) -> None:
        """Look and move until cancelled; what goes wrong is logged, and tried again at the next look."""
        while True:
            await asyncio.sleep(look_delay(self._interval, self._rng))
            try:
                await self.look()
            except Exception:
                logger.exception("could not rebalance; looking again in about %.0f s", self._interval)

    async def look(self) -> None:
        """Decide, twice if it comes to a move, and move."""
        server = self._server
        decision = self._rebalancer.look(server.registry.view(), server.info, server.move_cost)
        self._note(decision)
        if decision.target is None:
            return
        confirmed = None
        try:
            await server.announce_target(decision.target)
            await asyncio.sleep(SETTLE)
            confirmed = self._rebalancer.confirm(
                server.registry.view(), server.info, decision.target, server.move_cost
            )
            self._note(confirmed)
        finally:
            if confirmed is None or confirmed.target is None:
                await server.announce_target(None)
        if confirmed.target is not None:
            try:
                await server.move_to(confirmed.target)
            except SwarmError as exc:
                self.note = f"placement: could not move to {confirmed.target}: {exc}"
            else:
                self.note = f"placement: moved to {confirmed.target}"

    def _note(self, decision: Decision) -> None:
        self.note = f"placement: {decision}"
        logger.log(logging.INFO if decision.target else logging.DEBUG, "%r: %s", self._server, decision)
