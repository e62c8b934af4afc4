"""One peer of a training run: its copy of the parameters, and its part in every round."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from random import Random

import torch

from swarmcore.distribution import version
from swarmcore.errors import DeltaError, InputError, RunMismatchError, StaleRoundError, SwarmError
from swarmcore.registry.base import Registry
from swarmcore.registry.lan import follow_addresses
from swarmcore.rpc.node import Node
from swarmcore.tasks import BackgroundTasks, deadline_after
from swarmcore.training.local_steps.contributions import MOST_SAMPLES, Outgoing, contribute, prepare
from swarmcore.training.local_steps.coordinator import Coordinator
from swarmcore.training.local_steps.replica import Replica, Result, State, by_rank, is_better
from swarmcore.training.local_steps.run_peers import RunPeers
from swarmcore.training.local_steps.serving import Answering
from swarmcore.training.local_steps.settings import LocalStepsSettings, RoundReport
from swarmcore.training.local_steps.vectors import ErrorFeedback, Traffic, decode
from swarmcore.types import PeerId, ServerInfo, short
from swarmcore.wire.local_steps import DeliverDelta, GoTo, Lineage, Standing

logger = logging.getLogger(__name__)

ANNOUNCE_TTL = 300.0
_ATTEMPTS = 6
"""Rounds that a peer tries to get its delta into, before it trains on with it."""
_IN_STEP = 10
"""A peer that came too late for a round comes early for the next one, and waits up to so many deadlines."""


class RunMember:
    """Takes part in a run with a vector of parameters, float32.

    ``node`` listens, ``registry`` is of that node and has been started; neither is closed here. ``replica``
    is what the run begins with if nobody has begun it, or what this peer had before.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        settings: LocalStepsSettings,
        replica: Replica,
        *,
        rng: Random | None = None,
    ) -> None:
        if not node.addresses:
            raise InputError("a peer of a run has to be reachable: give its node a place to listen on")
        self.node = node
        self.settings = settings
        self.replica = replica
        self.traffic = Traffic()
        self.outgoing: Outgoing | None = None
        """What was delivered last. Make it None when it has `arrived`, and the next delta is without it."""
        self.residuals = ErrorFeedback()
        """Replaced and never changed."""
        self._registry = registry
        self._rng = rng or Random()
        self._peers = RunPeers(node, registry, replica, self.traffic)
        self._coordinator = Coordinator(node.peer, self._peers, settings.codec)
        self._reported = Traffic()
        self._tasks = BackgroundTasks()
        Answering(node, self._peers, self._coordinator)

    def __repr__(self) -> str:
        at = self.replica.lineage
        return (
            f"<RunMember {short(self.node.peer)} {self.settings.run!r} round {at.round} {at.state[:8]} "
            f"{len(self.alive)} peers>"
        )

    @property
    def alive(self) -> frozenset[PeerId]:
        """The peers of the run that are known now, this one included."""
        return self._peers.alive | {self.node.peer}

    async def join(self) -> None:
        """Announce that this peer takes part, and fetch the current parameters if others have begun.

        Raise `RunMismatchError` or `DeltaError` when they train something else, or in another way.
        """
        addresses = tuple(map(str, self.node.addresses))
        info = ServerInfo(self.node.peer, addresses, runs=(self.settings.run,), version=version())
        await self._registry.announce(info, ANNOUNCE_TTL)
        answers = await self._peers.ask(self._peers.alive)
        standings = {peer: answer for peer, answer in answers.items() if isinstance(answer, Standing)}
        refusals = [
            answer for answer in answers.values() if isinstance(answer, RunMismatchError | DeltaError)
        ]
        if refusals and not standings:
            await self._registry.withdraw()
            raise refusals[0]
        for peer in sorted(standings, key=lambda peer: _merit(standings[peer]), reverse=True):
            lineage = standings[peer].lineage
            if lineage == self.replica.lineage:
                break
            if not standings[peer].settled and not is_better(lineage, self.replica.lineage):
                continue
            if self.replica.gives_way_to(lineage) and await self._peers.try_to_catch_up(peer):
                break
        self.replica.settled = True
        following = follow_addresses(self.node, self._registry, info, ANNOUNCE_TTL)
        self._tasks.start(following, "announcing other addresses")
        logger.info("%r has joined", self)

    async def leave(self) -> None:
        """Say that this peer takes part no more. A round that is open here goes on elsewhere."""
        await self._tasks.close()
        await self._registry.withdraw()
        await self._coordinator.close()

    async def wait_for_peers(self, count: int, timeout: float) -> None:
        """Until ``count`` peers are known, this one included. Raise `DeadlineExceededError`."""
        async with deadline_after(
            timeout, f"the run {self.settings.run!r} has not come to {count} peers in {timeout:.0f} s"
        ):
            await self._peers.until(lambda: len(self.alive) >= count)

    async def exchange(self, delta: torch.Tensor, samples: int) -> RoundReport:
        """Bring ``delta``, of the parameters before and after some local steps, into the run's next round.

        The replica has then the current parameters, and `outgoing` has `arrived` in them; or it has not got
        into any of several rounds. If an earlier one is outgoing still, that is brought again, and ``delta``,
        which has all of it and more, has to wait for the next exchange. When cancelled, what is outgoing may
        arrive all the same. One at a time. Raise `DeltaError` for values that are not finite.
        """
        if not 0 < samples <= MOST_SAMPLES:
            raise InputError(f"a delta is of 1 sample or more; got {samples}")
        began = asyncio.get_running_loop().time()
        earlier = self.outgoing
        if earlier is None:
            self.outgoing, self.residuals = await asyncio.to_thread(
                prepare, delta, samples, self.settings.codec, self.residuals, self._rng
            )
        if not self._has_arrived:
            assert self.outgoing is not None
            await self._bring(self.outgoing)
        included = earlier is None and self._has_arrived
        return self._report(included, asyncio.get_running_loop().time() - began)

    def arrived(self, state: State) -> Outgoing | None:
        """What is outgoing, if it is in ``state``."""
        one = self.outgoing
        return one if one is not None and state.has(self.node.peer, one.delivery) else None

    @property
    def _has_arrived(self) -> bool:
        return self.arrived(self.replica.state) is not None

    async def _bring(self, outgoing: Outgoing) -> None:
        """Deliver it, until it has arrived or has been tried in several rounds."""
        patience = self.settings.deadline
        useless: Counter[PeerId] = Counter()  # they go on from other parameters, but have no better ones
        for _ in range(_ATTEMPTS):
            lineage = self.replica.lineage
            await self._try_round(lineage, outgoing, patience, useless)
            if self._has_arrived:
                return
            if self.replica.lineage != lineage:
                patience = _IN_STEP * self.settings.deadline
        logger.warning("%r: its delta got into none of %d rounds; it is kept", self, _ATTEMPTS)

    async def _try_round(
        self, lineage: Lineage, outgoing: Outgoing, patience: float, useless: Counter[PeerId]
    ) -> None:
        """Deliver to the coordinator of the round from ``lineage``, or who follows it, until the round ends.

        This peer itself is the last to be tried, and never fails.
        """
        terms, delivery, samples = self.replica.terms, outgoing.delivery, outgoing.samples
        own = contribute(
            self.node.identity, terms, lineage, delivery=delivery, samples=samples, length=outgoing.length
        )
        opening = DeliverDelta(terms, lineage, delivery, samples, patience, own.length, own.signature)
        waiting = deque(
            by_rank(self.settings.run, lineage.round, [peer for peer in self.alive if useless[peer] < 2])
        )
        visits: Counter[PeerId] = Counter()
        while waiting and self.replica.lineage == lineage:
            peer = waiting.popleft()
            visits[peer] += 1
            try:
                if peer == self.node.peer:
                    values = await asyncio.to_thread(decode, outgoing.pieces)
                    ended = await asyncio.shield(self._coordinator.deliver(lineage, own, values, patience))
                else:
                    ended = await self._peers.deliver(peer, opening, outgoing.pieces)
                if isinstance(ended, Result) and self.replica.lineage == lineage:
                    await self._peers.apply(peer, ended)
                elif isinstance(ended, GoTo) and visits[ended.peer] < 2 and useless[ended.peer] < 2:
                    if peer == self.node.peer:  # to come back to when that fails
                        waiting.appendleft(peer)
                    waiting.appendleft(ended.peer)
            except StaleRoundError as exc:
                if peer != self.node.peer and not await self._peers.try_to_catch_up(peer):
                    useless[peer] += 1
                logger.debug("%r: %s", self, exc)
            except SwarmError as exc:
                self._peers.failed(peer, exc)

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


def _merit(standing: Standing) -> tuple[bool, int, str]:
    return standing.settled, standing.lineage.work, standing.lineage.state
