"""The other peers of a run: who they are, and what can be asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence

from swarmcore.errors import DeltaError, ProtocolError, StreamAbortedError, StreamClosedError, SwarmError
from swarmcore.registry.base import Registry
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.tasks import deadline_after
from swarmcore.training.local_steps.replica import KEPT_RESULTS, Replica, Result, State
from swarmcore.training.local_steps.vectors import Traffic, decode, next_message, receive, send
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.local_steps import (
    LOCAL_STEPS_PROTOCOL,
    PIECE_VALUES,
    STANDING_METHOD,
    AskStanding,
    DeliverDelta,
    FetchState,
    GoTo,
    ResultsFollow,
    RoundOpen,
    RoundResult,
    Standing,
    StateFollows,
)
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 3.0
OPEN_TIMEOUT = 5.0
CLOSING_TIME = 60.0
"""Seconds beyond its patience in which a round has to end, and two more for each piece of the parameters."""


class RunPeers:
    """Calls to the peers that announce the run, and `replica` brought up to date from them.

    ``on_change`` is called after the replica has changed here.
    """

    def __init__(self, node: Node, registry: Registry, replica: Replica, traffic: Traffic) -> None:
        self.replica = replica
        self.traffic = traffic
        self.on_change: Callable[[], None] = lambda: None
        self.distrusted: set[PeerId] = set()
        """Peers that gave the result of a round which cannot be one. They are left out of everything."""
        self._node = node
        self._registry = registry
        self._catching_up = asyncio.Lock()

    @property
    def alive(self) -> frozenset[PeerId]:
        """Peers of the run that the registry knows now, without this one and those that are `distrusted`."""
        run = self.replica.terms.run
        found = {info.peer for info in self._registry.view() if run in info.runs and info.addresses}
        return frozenset(found - self.distrusted - {self._node.peer})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change in the registry that makes ``condition`` true."""
        changes = self._registry.changes()
        if condition():
            return
        async for _ in changes:
            if condition():
                return
        raise StreamClosedError("the registry was closed")

    async def ask(self, peers: Collection[PeerId]) -> dict[PeerId, Standing | SwarmError]:
        """How far they are, asked all at once; for those that do not say, why."""
        order = sorted(peers)
        answers = await asyncio.gather(*(self._ask_one(peer) for peer in order))
        return dict(zip(order, answers, strict=True))

    async def _ask_one(self, peer: PeerId) -> Standing | SwarmError:
        try:
            return await self._node.call(
                self._addresses(peer), STANDING_METHOD, AskStanding(self.replica.terms), timeout=ASK_TIMEOUT
            )
        except SwarmError as exc:
            self.failed(peer, exc)
            return exc

    async def deliver(self, peer: PeerId, opening: DeliverDelta, pieces: Sequence[Tensor]) -> Result | GoTo:
        """Bring a delta to ``peer`` and wait for the end of the round.

        Raise `StaleRoundError` when it goes on from other parameters, what the connection raises, and
        `DeadlineExceededError` when the round should have ended long ago.
        """
        seconds = opening.patience + self._closing_time
        async with (
            deadline_after(seconds, f"{short(peer)} did not end the round in {seconds:.0f} s"),
            await self._open(peer, opening) as channel,
        ):
            with contextlib.suppress(StreamClosedError, StreamAbortedError):  # what is received says why
                await send(channel, pieces, self.traffic)
            while isinstance((message := await next_message(channel)).record, RoundOpen):
                pass
            if isinstance(message.record, GoTo):
                return message.record
            return await self._receive_result(channel, message.record)

    async def catch_up(self, peer: PeerId) -> bool:
        """Bring the replica to ``peer``'s state, if it gives way to that; whether it has changed.

        Raise what the connection raises, `ProtocolError` and `DeltaError` for a state that is none.
        """
        async with (
            self._catching_up,
            deadline_after(
                self._closing_time, f"{short(peer)} did not send its state in {self._closing_time:.0f} s"
            ),
        ):
            replica, before = self.replica, self.replica.lineage
            opening = FetchState(replica.terms, before.state)
            try:
                async with await self._open(peer, opening) as channel:
                    record = (await next_message(channel)).record
                    if isinstance(record, ResultsFollow):
                        await self._apply_results(channel, record.count)
                    elif isinstance(record, StateFollows) and replica.gives_way_to(record.lineage):
                        await replica.adopt(await self._receive_state(channel, record))
            finally:
                changed = replica.lineage != before
                if changed:
                    self.on_change()
            return changed

    async def try_to_catch_up(self, peer: PeerId) -> bool:
        """As `catch_up`; False, and nothing raised, where that fails."""
        try:
            return await self.catch_up(peer)
        except SwarmError as exc:
            self.failed(peer, exc)
            return False

    async def apply(self, peer: PeerId, result: Result) -> None:
        """Go on to a result that ``peer`` gave. Raise as `Replica.apply`."""
        try:
            await self.replica.apply(result)
        except (ProtocolError, DeltaError) as exc:
            self.distrusted.add(peer)
            logger.warning("run %r: %s is left out from now on: %s", self.replica.terms.run, peer, exc)
            raise

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """``peer`` did not do as it should."""
        logger.debug("run %r: %s: %s", self.replica.terms.run, short(peer), error)
        self._registry.suspect(peer)

    async def _apply_results(self, channel: Channel, count: int) -> None:
        if count > KEPT_RESULTS:
            raise ProtocolError(f"{count} results of rounds announced, more than the {KEPT_RESULTS} kept")
        for _ in range(count):
            result = await self._receive_result(channel, (await next_message(channel)).record)
            # This peer may have got there by itself meanwhile.
            if self.replica.since(result.lineage.state) is None:
                await self.apply(channel.remote, result)

    async def _receive_result(self, channel: Channel, record: object) -> Result:
        if not isinstance(record, RoundResult):
            raise ProtocolError(f"a {type(record).__name__} came where the result of a round was expected")
        pieces = await receive(channel, self.replica.terms.values, self.traffic)
        return await asyncio.to_thread(Result, record, tuple(pieces))

    async def _receive_state(self, channel: Channel, record: StateFollows) -> State:
        parameters, velocity = [
            await receive(channel, self.replica.terms.values, self.traffic) for _ in range(2)
        ]
        return await asyncio.to_thread(
            lambda: State.of(record.lineage, decode(parameters), decode(velocity), record.included)
        )

    @property
    def _closing_time(self) -> float:
        return CLOSING_TIME + 2 * self.replica.terms.values / PIECE_VALUES

    async def _open(self, peer: PeerId, opening: DeliverDelta | FetchState) -> Channel:
        return await self._node.open(
            self._addresses(peer), LOCAL_STEPS_PROTOCOL, opening, timeout=OPEN_TIMEOUT
        )

    def _addresses(self, peer: PeerId) -> tuple[Address, ...]:
        info = self._registry.view().servers.get(peer)
        if info is None or not info.addresses:
            raise StreamClosedError(f"{short(peer)} has left the run")
        return info.dialable
