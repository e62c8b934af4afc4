"""One peer of a training run: its copy of the parameters, and its part in every round."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from importlib.metadata import version
from random import Random

import torch

from swarmcore.errors import DeltaError, InputError, RunMismatchError, StaleRoundError, SwarmError
from swarmcore.executor.torch.residuals import Residuals
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.training.local_steps.averaging import norm
from swarmcore.training.local_steps.coordinator import Coordinator
from swarmcore.training.local_steps.deadline import within
from swarmcore.training.local_steps.lineage import by_rank, is_better
from swarmcore.training.local_steps.partners import Partners
from swarmcore.training.local_steps.pieces import Traffic, check_codec, decode, encode
from swarmcore.training.local_steps.replica import Replica, Result
from swarmcore.training.local_steps.serving import MOST_SAMPLES, Answering
from swarmcore.training.local_steps.settings import LocalStepsSettings, RoundReport
from swarmcore.types import PeerId, ServerInfo, short
from swarmcore.wire.local_steps import Contribution, DeliverDelta, GoTo, Lineage, RunTerms, Standing
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

ANNOUNCE_TTL = 300.0
_ATTEMPTS = 6
"""Rounds that a peer tries to get its delta into, before it trains on with it."""
_IN_STEP = 10
"""A peer that came too late for a round comes early for the next one, and waits up to so many deadlines."""


class RunMember:
    """Takes part in a run with a vector of parameters, float32.

    ``node`` listens, ``registry`` is of that node and has been started; neither is closed here.
    ``parameters`` are what the run begins with if nobody has begun it.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        settings: LocalStepsSettings,
        parameters: torch.Tensor,
        *,
        layout: str = "",
        rng: Random | None = None,
    ) -> None:
        if not node.addresses:
            raise InputError("a peer of a run has to be reachable: give its node a place to listen on")
        check_codec(settings.codec)
        if not len(parameters):
            raise InputError("there are no parameters to train")
        norm(parameters)
        self.node = node
        self.settings = settings
        terms = RunTerms(settings.run, len(parameters), layout, settings.outer_lr, settings.momentum)
        self.replica = Replica(terms, parameters)
        self.traffic = Traffic()
        self.residuals = Residuals()
        self._registry = registry
        self._rng = rng or Random()
        self._partners = Partners(node, registry, self.replica, self.traffic)
        self._coordinator = Coordinator(node.peer, self._partners, settings.codec)
        self._reported = Traffic()
        self._exchanging = False
        Answering(node, self._partners, self._coordinator)

    def __repr__(self) -> str:
        at = self.replica.lineage
        return (
            f"<RunMember {short(self.node.peer)} {self.settings.run!r} round {at.round} {at.state[:8]} "
            f"{len(self.alive)} peers>"
        )

    @property
    def alive(self) -> frozenset[PeerId]:
        """The peers of the run that are known now, this one included."""
        return self._partners.alive | {self.node.peer}

    async def join(self) -> None:
        """Announce that this peer takes part, and fetch the current parameters if others have begun.

        Raise `RunMismatchError` or `DeltaError` when they train something else, or in another way.
        """
        addresses = tuple(map(str, self.node.addresses))
        info = ServerInfo(self.node.peer, addresses, runs=(self.settings.run,), version=version("swarmcore"))
        await self._registry.announce(info, ANNOUNCE_TTL)
        answers = await self._partners.ask(self._partners.alive)
        standings = {peer: said for peer, said in answers.items() if isinstance(said, Standing)}
        refusals = [said for said in answers.values() if isinstance(said, RunMismatchError | DeltaError)]
        if refusals and not standings:
            await self._registry.withdraw()
            raise refusals[0]
        for peer in sorted(standings, key=lambda peer: _merit(standings[peer]), reverse=True):
            said = standings[peer]
            if said.lineage == self.replica.lineage:
                break
            if not said.settled and not is_better(said.lineage, self.replica.lineage):
                continue
            if await self._catch_up(peer):
                break
        self.replica.settled = True
        logger.info("%r has joined", self)

    async def leave(self) -> None:
        """Say that this peer takes part no more. A round that is open here goes on elsewhere."""
        await self._registry.withdraw()
        await self._coordinator.close()

    async def wait_for_peers(self, count: int, timeout: float) -> None:
        """Until ``count`` peers are known, this one included. Raise `DeadlineExceededError`."""
        async with within(timeout, f"the run {self.settings.run!r} has not come to {count} peers"):
            await self._partners.until(lambda: len(self.alive) >= count)

    async def exchange(self, delta: torch.Tensor, samples: int) -> RoundReport:
        """Bring ``delta``, of the parameters before and after some local steps, into the run's next round.

        The replica has then the current parameters. Returns when a round with this delta has ended, or when
        it has not got into any of several; it is then as if it had not been tried. Raise `DeltaError` for
        values that are not finite.
        """
        if self._exchanging:
            raise InputError("an exchange is under way; wait for its end before the next")
        if not 0 < samples <= MOST_SAMPLES:
            raise InputError(f"a delta is of 1 sample or more; got {samples}")
        norm(delta)
        self._exchanging = True
        began = asyncio.get_running_loop().time()
        before = self.residuals.state_dict()
        contribution = Contribution(self.node.peer, self._rng.getrandbits(63), samples)
        included = False
        try:
            pieces = encode(delta, self.settings.codec, self.residuals)
            included = await self._bring(contribution, pieces)
        finally:
            self._exchanging = False
            if not included:
                self.residuals.load_state_dict(before)
        return self._report(included, asyncio.get_running_loop().time() - began)

    async def _bring(self, contribution: Contribution, pieces: list[Tensor]) -> bool:
        values = decode(pieces)
        patience = self.settings.deadline
        useless: Counter[PeerId] = Counter()  # they go on from other parameters, but have no better ones
        for _ in range(_ATTEMPTS):
            lineage = self.replica.lineage
            await self._try_round(lineage, contribution, pieces, values, patience, useless)
            if self.replica.included.get(self.node.peer) == contribution:
                return True
            if self.replica.lineage != lineage:
                patience = _IN_STEP * self.settings.deadline
        logger.warning("%r: its delta got into none of %d rounds; it is kept", self, _ATTEMPTS)
        return False

    async def _try_round(
        self,
        lineage: Lineage,
        contribution: Contribution,
        pieces: list[Tensor],
        values: torch.Tensor,
        patience: float,
        useless: Counter[PeerId],
    ) -> None:
        """Deliver to the coordinator of the round from ``lineage``, or who follows it, until the round ends.

        This peer itself is the last to be tried, and never fails.
        """
        opening = DeliverDelta(
            self.replica.terms, lineage, contribution.delivery, contribution.samples, patience
        )
        waiting = deque(
            by_rank(self.settings.run, lineage.round, [peer for peer in self.alive if useless[peer] < 2])
        )
        visits: Counter[PeerId] = Counter()
        while waiting and self.replica.lineage == lineage:
            peer = waiting.popleft()
            visits[peer] += 1
            try:
                if peer == self.node.peer:
                    ended = await asyncio.shield(
                        self._coordinator.deliver(lineage, contribution, values, patience)
                    )
                else:
                    ended = await self._partners.deliver(peer, opening, pieces)
                if isinstance(ended, Result) and self.replica.lineage == lineage:
                    self.replica.apply(ended)
                elif isinstance(ended, GoTo) and visits[ended.peer] < 2 and useless[ended.peer] < 2:
                    if peer == self.node.peer:  # to come back to when that fails
                        waiting.appendleft(peer)
                    waiting.appendleft(ended.peer)
            except StaleRoundError as exc:
                if peer != self.node.peer and not await self._catch_up(peer):
                    useless[peer] += 1
                logger.debug("%r: %s", self, exc)
            except SwarmError as exc:
                self._partners.failed(peer, exc)

    async def _catch_up(self, peer: PeerId) -> bool:
        try:
            return await self._partners.catch_up(peer)
        except SwarmError as exc:
            self._partners.failed(peer, exc)
            return False

    def _report(self, included: bool, seconds: float) -> RoundReport:
        last = self.replica.last
        report = RoundReport(
            round=self.replica.lineage.round,
            included=included,
            peers=len(last.contributions) if last is not None else 0,
            samples=sum(c.samples for c in last.contributions) if last is not None else 0,
            seconds=seconds,
            sent=self.traffic.sent - self._reported.sent,
            received=self.traffic.received - self._reported.received,
        )
        self._reported = Traffic(self.traffic.sent, self.traffic.received)
        logger.info("run %r, %s", self.settings.run, report)
        return report


def _merit(said: Standing) -> tuple[bool, int, str]:
    return said.settled, said.lineage.work, said.lineage.state
