"""A round on the peer that coordinates it: who has delivered, when it ends, and its result."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import attrs
import torch

from swarmcore.errors import StaleRoundError, StreamClosedError, SwarmError
from swarmcore.tasks import cancel_and_wait, wait_until_set
from swarmcore.training.local_steps.contributions import average, shares
from swarmcore.training.local_steps.replica import Result, by_rank
from swarmcore.training.local_steps.run_peers import RunPeers
from swarmcore.training.local_steps.vectors import encode, result_codec
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, GoTo, Lineage, RoundResult, Standing

Values = TypeVar("Values")


@attrs.frozen
class Delivery(Generic[Values]):
    """A delta that has arrived."""

    contribution: Contribution
    values: Values
    ends: float
    """When the round has to end for its sender."""


class Round(Generic[Values]):
    """Collects the deltas of one round.

    It is due when all members have delivered, or when the patience of one that has is at its end.
    """

    def __init__(self, lineage: Lineage, members: Collection[PeerId]) -> None:
        self.lineage = lineage
        """What the deltas are to be subtracted from."""
        self.members = frozenset(members)
        self._deliveries: dict[PeerId, Delivery[Values]] = {}

    def __repr__(self) -> str:
        return f"<Round {self.lineage.round} {len(self._deliveries)} of {len(self.missing) + len(self)}>"

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def missing(self) -> frozenset[PeerId]:
        """Members that have not delivered."""
        return self.members - self._deliveries.keys()

    @property
    def deliveries(self) -> list[Delivery[Values]]:
        """In the order of peer ids, which does not depend on who came first."""
        return [self._deliveries[peer] for peer in sorted(self._deliveries)]

    def deliver(self, contribution: Contribution, values: Values, *, now: float, patience: float) -> None:
        """A peer's delta has come; a later one of the same peer replaces it, its end stays."""
        before = self._deliveries.get(contribution.peer)
        ends = now + patience
        if before is not None:
            ends = min(ends, before.ends)
        self._deliveries[contribution.peer] = Delivery(contribution, values, ends)

    def see(self, members: Collection[PeerId]) -> None:
        """These are the members that are alive now."""
        self.members = frozenset(members)

    @property
    def ends(self) -> float:
        """When it has to end."""
        return min((delivery.ends for delivery in self._deliveries.values()), default=math.inf)

    def is_due(self, now: float) -> bool:
        return bool(self._deliveries) and (not self.missing or now >= self.ends)


_LOOK = 0.5
"""Seconds between looks at who is alive."""

_ASK = 2.0
"""Seconds between questions to those who are missing."""

Ending = asyncio.Future[Result | GoTo]


class Coordinator:
    """Holds the round that is open here, if there is one, and ends it.

    Before it ends a round, and now and then while it waits, it asks the members that are missing how far they
    are: if one has the result of this round already, from a coordinator that is gone, that result counts; if
    one of better rank has the round open too, all go there.
    """

    def __init__(self, own: PeerId, peers: RunPeers, codec: str) -> None:
        self._own = own
        self._peers = peers
        self._replica = peers.replica
        self._codec = result_codec(codec)
        self._round: Round[torch.Tensor] | None = None
        self._ending: Ending | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        peers.on_change = self._changed.set

    def __repr__(self) -> str:
        return f"<Coordinator {self._round or 'no round'}>"

    @property
    def standing(self) -> Standing:
        """How far this peer is, for those who ask."""
        delivered = len(self._round) if self._round is not None else 0
        return Standing(self._replica.lineage, delivered, self._replica.settled)

    @property
    def counts(self) -> tuple[int, int]:
        """Deltas that have come for the open round, and members that it waits for or has heard."""
        current = self._round
        return (len(current), len(current) + len(current.missing)) if current is not None else (0, 0)

    def check(self, lineage: Lineage) -> None:
        """Raise `StaleRoundError` unless a delta from there belongs to the next round."""
        if lineage != self._replica.lineage:
            at = self._replica.lineage
            raise StaleRoundError(
                f"a delta of round {lineage.round} ({lineage.state[:8]}) came when the run was at round "
                f"{at.round} ({at.state[:8]}) here; fetch the current parameters",
                round=at.round,
            )

    def deliver(
        self, lineage: Lineage, contribution: Contribution, values: torch.Tensor, patience: float
    ) -> Ending:
        """Take a delta into the round; the future is how the round ends. Raise `StaleRoundError` as `check`.

        ``values`` are those that the contribution was signed for, which has been looked at.
        """
        self.check(lineage)
        if self._round is None or self._ending is None or self._round.lineage != lineage:
            self._cancel()
            self._round = Round(lineage, self._members)
            self._ending = asyncio.get_running_loop().create_future()
            self._ending.add_done_callback(_look_at)
            self._task = asyncio.create_task(self._run(self._round, self._ending), name="local-steps round")
        now = asyncio.get_running_loop().time()
        self._round.deliver(contribution, values, now=now, patience=patience)
        self._changed.set()
        return self._ending

    async def close(self) -> None:
        task = self._task
        self._cancel()
        await cancel_and_wait(task)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._round = self._ending = self._task = None

    @property
    def _members(self) -> Collection[PeerId]:
        return self._peers.alive | {self._own}

    async def _run(self, round: Round[torch.Tensor], ending: Ending) -> None:
        try:
            ending.set_result(await self._conclude(round))
        except SwarmError as exc:
            ending.set_exception(exc)
        finally:
            if not ending.done():
                ending.set_exception(StreamClosedError("this peer no longer coordinates the round"))
            if self._round is round:
                self._round = self._ending = self._task = None

    async def _conclude(self, round: Round[torch.Tensor]) -> Result | GoTo:
        while True:
            due = await self._until_due(round)
            preferred = await self._look_around(round)
            self.check(round.lineage)
            if preferred is not None:
                return GoTo(preferred)
            if due:
                break
        result = await asyncio.to_thread(_result, round.lineage, round.deliveries, self._codec)
        await self._replica.apply(result)
        return result

    async def _until_due(self, round: Round[torch.Tensor]) -> bool:
        """Wait until the round is due, or it is time to ask the others; whether it is due."""
        now = asyncio.get_running_loop().time
        until = now() + _ASK
        while True:
            self._changed.clear()
            self.check(round.lineage)
            round.see(self._members)
            if round.is_due(now()):
                return True
            if now() >= until:
                return False
            await wait_until_set(self._changed, min(_LOOK, round.ends - now()))

    async def _look_around(self, round: Round[torch.Tensor]) -> PeerId | None:
        """Ask those who are missing; return who should end the round instead."""
        missing = round.missing - {self._own}
        if not missing:
            return None
        answers = await self._peers.ask(missing)
        standings = {peer: answer for peer, answer in answers.items() if isinstance(answer, Standing)}
        ahead = [peer for peer, answer in standings.items() if self._replica.gives_way_to(answer.lineage)]
        for peer in sorted(ahead, key=lambda peer: (standings[peer].lineage.work, peer), reverse=True):
            if await self._peers.try_to_catch_up(peer):
                break
        rank = by_rank(self._replica.terms.run, round.lineage.round, {self._own, *standings})
        for peer in rank[: rank.index(self._own)]:
            if standings[peer].delivered and standings[peer].lineage == round.lineage:
                return peer
        return None


def _result(lineage: Lineage, deliveries: Sequence[Delivery[torch.Tensor]], codec: str) -> Result:
    contributions = tuple(delivery.contribution for delivery in deliveries)
    factors, work = shares([one.length for one in contributions], [one.samples for one in contributions])
    mean = average([delivery.values for delivery in deliveries], factors)
    return Result(RoundResult(lineage, contributions, work), tuple(encode(mean, codec)))


def _look_at(ending: Ending) -> None:
    """Nobody may wait for it any more; asyncio would complain."""
    if not ending.cancelled():
        ending.exception()
