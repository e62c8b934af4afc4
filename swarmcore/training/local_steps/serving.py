"""What a peer of a run answers the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence

import torch

from swarmcore.errors import (
    DeltaError,
    InputError,
    PeerNotAllowedError,
    StaleRoundError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.training.local_steps.contributions import MOST_SAMPLES, is_sound, norm
from swarmcore.training.local_steps.coordinator import Coordinator, Ending
from swarmcore.training.local_steps.replica import Result
from swarmcore.training.local_steps.run_peers import RunPeers
from swarmcore.training.local_steps.settings import check_terms
from swarmcore.training.local_steps.vectors import decode, encode, receive, send
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import (
    LOCAL_STEPS_PROTOCOL,
    STANDING_METHOD,
    AskStanding,
    Contribution,
    DeliverDelta,
    FetchState,
    GoTo,
    ResultsFollow,
    RoundOpen,
    RunTerms,
    Standing,
    StateFollows,
)
from swarmcore.wire.method import Caller
from swarmcore.wire.tensors import Tensor

_BEAT = 2.0
"""Seconds between signs that a round is still open."""

_INTRODUCTION = 2.0
"""Seconds that a newcomer's announcement may take to arrive after its first call."""

MOST_FETCHES = 2
"""Fetches of one peer at a time: each keeps the parameters of its round in memory until they are read."""

MOST_PATIENCE = 24 * 3600.0
_ROUNDING = 1e-3
"""By so much, of itself, a norm may differ from one processor to the next."""


class Answering:
    """Serves the local-steps protocol on a node, for one run."""

    def __init__(self, node: Node, peers: RunPeers, coordinator: Coordinator) -> None:
        self._peers = peers
        self._coordinator = coordinator
        self._replica = peers.replica
        self._delivering: set[PeerId] = set()
        self._fetching: Counter[PeerId] = Counter()
        node.serve(STANDING_METHOD, self._standing)
        node.serve_protocol(LOCAL_STEPS_PROTOCOL, self._serve)

    async def _standing(self, request: AskStanding, caller: Caller) -> Standing:
        await self._check(caller.peer, request.terms)
        return self._coordinator.standing

    async def _serve(self, channel: Channel) -> None:
        opening = channel.opening.record
        await self._check(channel.remote, opening.terms)
        if isinstance(opening, DeliverDelta):
            await self._take(channel, opening)
            return
        if self._fetching[channel.remote] >= MOST_FETCHES:
            raise TooManyCallsError("you fetch parameters here already; read those first")
        self._fetching[channel.remote] += 1
        try:
            await self._give(channel, opening)
        finally:
            self._fetching[channel.remote] -= 1
            if not self._fetching[channel.remote]:
                del self._fetching[channel.remote]

    async def _check(self, peer: PeerId, terms: RunTerms) -> None:
        """Raise unless ``peer`` may take part, on terms that are the same as here."""
        check_terms(self._replica.terms, terms)
        if peer in self._peers.distrusted:
            raise PeerNotAllowedError(
                f"{peer} gave the result of a round that cannot be one, and is listened to no more"
            )
        if not await self._is_introduced(peer):
            raise PeerNotAllowedError(
                f"only peers that announce the run {terms.run!r} are listened to, and {peer} does not"
            )

    async def _is_introduced(self, peer: PeerId) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_INTRODUCTION):
                await self._peers.until(lambda: peer in self._peers.alive)
        return peer in self._peers.alive

    async def _take(self, channel: Channel, opening: DeliverDelta) -> None:
        if not 0 < opening.samples <= MOST_SAMPLES or not 0 <= opening.patience <= MOST_PATIENCE:
            raise InputError(f"a delta of {opening.samples} samples that waits {opening.patience} s")
        if self._replica.gives_way_to(opening.lineage):
            try:
                await self._peers.catch_up(channel.remote)
            except SwarmError as exc:
                if opening.lineage != self._replica.lineage:
                    raise StaleRoundError(f"your state could not be fetched: {exc.message}") from exc
        self._coordinator.check(opening.lineage)
        if channel.remote in self._delivering:  # each takes as much memory as the parameters
            raise TooManyCallsError("another delta of yours is coming in; wait for it")
        self._delivering.add(channel.remote)
        try:
            ending = await self._deliver(channel, opening)
        finally:
            self._delivering.discard(channel.remote)
        while not ending.done():
            await asyncio.wait([ending], timeout=_BEAT)
            if not ending.done():
                await channel.send(RoundOpen(*self._coordinator.counts))
        ended = ending.result()
        if isinstance(ended, GoTo):
            await channel.send(ended)
        else:
            await self._send_result(channel, ended)

    async def _deliver(self, channel: Channel, opening: DeliverDelta) -> Ending:
        pieces = await receive(channel, self._replica.terms.values, self._peers.traffic)
        contribution = Contribution(
            channel.remote, opening.delivery, opening.samples, opening.length, opening.signature
        )
        values = await asyncio.to_thread(_values, pieces, contribution, opening)
        return self._coordinator.deliver(opening.lineage, contribution, values, opening.patience)

    async def _give(self, channel: Channel, opening: FetchState) -> None:
        state, results = self._replica.state, self._replica.since(opening.have)
        whole = 2 * state.parameters.nbytes
        if results is not None and sum(result.nbytes for result in results) <= whole:
            await channel.send(ResultsFollow(len(results)))
            for result in results:
                await self._send_result(channel, result)
            return
        await channel.send(StateFollows(state.lineage, tuple(state.included.values())))
        for vector in (state.parameters, state.velocity):
            await send(channel, encode(vector, "raw"), self._peers.traffic)

    async def _send_result(self, channel: Channel, result: Result) -> None:
        await channel.send(result.record)
        await send(channel, result.pieces, self._peers.traffic)


def _values(pieces: Sequence[Tensor], contribution: Contribution, opening: DeliverDelta) -> torch.Tensor:
    """The delta. Raise `DeltaError` unless it is finite, and what its contribution was signed for."""
    values = decode(pieces)
    length = norm(values, "the delta")
    if abs(length - contribution.length) > _ROUNDING * length:
        raise DeltaError(f"the delta has the norm {length:g}, and not {contribution.length:g}")
    if not is_sound(contribution, opening.terms, opening.lineage):
        raise DeltaError("the delta's signature is not its sender's for this round")
    return values
