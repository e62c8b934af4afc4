"""A transport that misbehaves on purpose: slow, lossy, cut in two, corrupting, and repeatable from a seed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

import attrs

from swarmcore.errors import PeerUnreachableError
from swarmcore.testing.faulty_stream import FaultyStream, Link
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short


@attrs.frozen
class Faults:
    """What happens to the messages that one side sends."""

    delay: float = 0.0
    """Seconds that each message is under way."""
    jitter: float = 0.0
    """Most seconds added to the delay of a message, uniformly distributed. Order within a stream is kept."""
    rate: float = math.inf
    """Bytes per second to one peer, all streams together."""
    loss: float = 0.0
    """Probability, for each message, that its stream breaks instead, as when a connection is lost."""
    corruption: float = 0.0
    """Probability, for each message, that one of its bits is flipped.

    The message above the transport is what changes. On a network, authenticated transports notice and drop
    the connection: that is ``loss``.
    """


class FaultyTransport(Transport):
    """Wraps any transport and delays, breaks and corrupts what it sends; a partition stops both directions.

    ``faults`` holds for every peer that has no entry in ``faults_toward``; both may be changed at any time,
    for messages sent from then on. Wrap both ends for a link that is faulty both ways. Waits are on the
    loop's clock and chance comes from ``random`` only, so a run on virtual time repeats exactly.
    """

    def __init__(self, inner: Transport, random: Random, faults: Faults | None = None) -> None:
        super().__init__(
            inner.identity, limits=inner.limits, listen_on=inner.listen_on, announce=inner.announce
        )
        self.scheme = inner.scheme  # type: ignore[misc]  # it stands in for the transport that it wraps
        self.inner = inner
        self.faults = faults or Faults()
        self.faults_toward: dict[PeerId, Faults] = {}
        self._random = random
        self._links: dict[PeerId, Link] = {}
        self._all_cut = False
        self._on_stream: OnStream | None = None
        inner.on_addresses = lambda addresses: self.on_addresses(addresses)

    def partition(self, *peers: PeerId) -> None:
        """Let nothing pass between this side and ``peers`` (everybody when none is named) until `heal`.

        As on a network, senders do not notice at first: open streams are lost after three keep-alive
        periods, and what was under way arrives if it heals before. New streams to these peers time out.
        """
        if not peers:
            self._all_cut = True
        for peer in peers or tuple(self._links):
            self._link(peer).cut(3 * self.limits.keepalive)

    def heal(self, *peers: PeerId) -> None:
        """End the partition from ``peers``, from everybody when none is named."""
        if not peers:
            self._all_cut = False
        for peer in peers or tuple(self._links):
            self._link(peer).heal()

    def break_connections(self, *peers: PeerId) -> None:
        """Lose every open stream with ``peers``, with everybody when none is named. New ones can open."""
        for peer in peers or tuple(self._links):
            self._link(peer).lose_streams()

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._on_stream = on_stream
        return await self.inner.listen(self._accept)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self.inner.allow_only(peers)

    def notes(self) -> Sequence[str]:
        return self.inner.notes()

    def preference(self, address: Address) -> int:
        return self.inner.preference(address)

    async def open_stream(self, address: Address) -> Stream:
        link = self._link(address.peer)
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                await link.passable()
                # A handshake is a round trip; both ways are taken to be as slow as this one.
                await asyncio.sleep(2 * self._faults_toward(address.peer).delay)
                await link.passable()
        except TimeoutError as exc:
            raise PeerUnreachableError(f"{address} did not answer: the network is partitioned") from exc
        return self._wrap(await self.inner.open_stream(address))

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()
        await self.inner.close()

    async def _accept(self, stream: Stream) -> None:
        assert self._on_stream is not None
        wrapped = self._wrap(stream)
        try:
            await self._on_stream(wrapped)
        finally:
            await wrapped.close()
            await wrapped.drained()

    def _wrap(self, stream: Stream) -> FaultyStream:
        return FaultyStream(stream, self._link(stream.remote), self.limits, self._schedule)

    def _link(self, peer: PeerId) -> Link:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(peer)
            if self._all_cut:
                link.cut(3 * self.limits.keepalive)
        return link

    def _faults_toward(self, peer: PeerId) -> Faults:
        return self.faults_toward.get(peer, self.faults)

    def _schedule(self, peer: PeerId, message: bytearray, now: float) -> float | None:
        """Corrupt ``message`` or not, and say when it arrives; None when its stream breaks instead."""
        faults = self._faults_toward(peer)
        if faults.loss and self._random.random() < faults.loss:
            return None
        if message and faults.corruption and self._random.random() < faults.corruption:
            message[self._random.randrange(len(message))] ^= 1 << self._random.randrange(8)
        link = self._link(peer)
        link.busy_until = max(link.busy_until, now) + len(message) / faults.rate
        jitter = self._random.uniform(0.0, faults.jitter) if faults.jitter else 0.0
        return link.busy_until + faults.delay + jitter

    def __repr__(self) -> str:
        state: list[Any] = [f"{self.faults.delay * 1000:g} ms"]
        if cut := sum(not link.open for link in self._links.values()):
            state.append(f"{cut} peers cut off")
        return f"<FaultyTransport {self.scheme} {short(self.identity.peer)} {' '.join(state)}>"
