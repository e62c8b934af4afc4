"""The next stage of a session: how a server connects to the peer that its client names, and pushes to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict

from swarmcore.errors import DeadlineExceededError, PeerUnreachableError, SwarmError
from swarmcore.pacing import TokenBuckets
from swarmcore.registry.base import Registry
from swarmcore.resources import Resource
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import probe
from swarmcore.tasks import cancel_and_wait, deadline_after, running
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import MAX_ADDRESSES
from swarmcore.wire.messages import Hop, JoinSession, Ping, Step
from swarmcore.wire.protocols import INFERENCE_PROTOCOL, PING_METHOD
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

DIAL_TIMEOUT = 5.0
"""Seconds to reach the next server of a chain before the client is asked to carry the hop."""

KNOWN_TIMEOUT = 2.0
"""Seconds in which the record of a server that has just joined may yet come."""

PROVEN_REMEMBERED = 1024
"""Stages whose addresses are remembered beyond their records."""

RATE, BURST = 4.0, 64.0
"""Hops a second that one client may have connected to, on average and at once."""


class StageDialer:
    """Connects to stages that clients name.

    Where to dial is taken from the record that the stage itself has signed and announced, never from the
    client: a server would else dial whatever a stranger likes. A stage that has proven its id there before is
    known by that when its record has come to an end, as in a restart. Whatever goes wrong, the client hears
    the same: what answers at an address, and what does not, is none of its business.
    """

    def __init__(self, node: Node, registry: Registry, counters: Counter[str]) -> None:
        self._node = node
        self._registry = registry
        self._counters = counters
        self._rates = TokenBuckets[PeerId](RATE, BURST)
        self._proven: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()

    async def connect(self, hop: Hop, client: PeerId) -> Channel:
        """A channel into the session that ``client`` has opened at ``hop``.

        Raise `PeerUnreachableError` when there is none to be had.
        """
        try:
            return await self._connect(hop, client)
        except SwarmError as exc:
            self._counters["hops_refused"] += 1
            logger.debug("cannot connect to %s for %s: %s", short(hop.peer), short(client), exc)
            raise PeerUnreachableError("the next stage was not reached") from exc

    async def probe(self, hop: Hop, *, least: float) -> None:
        """Return when the stage answers; raise as `swarmcore.rpc.ping.probe`."""
        await probe(self._node, await self._addresses(hop.peer), PING_METHOD, Ping(), least=least)

    async def _connect(self, hop: Hop, client: PeerId) -> Channel:
        now = asyncio.get_running_loop().time()
        if len(hop.addresses) > MAX_ADDRESSES:
            raise PeerUnreachableError(f"{len(hop.addresses)} addresses named, more than {MAX_ADDRESSES}")
        if not self._rates.take(client, now):
            raise PeerUnreachableError("the client asks for too many hops")
        deadline = now + DIAL_TIMEOUT
        with await self._node.resources.acquire(client, Resource.DIALS, deadline=deadline):
            found = await self._addresses(hop.peer)
            opening = JoinSession(hop.session)
            timeout = deadline - asyncio.get_running_loop().time()
            channel = await self._node.open(found, INFERENCE_PROTOCOL, opening, timeout=timeout)
        self._proven[hop.peer] = found
        self._proven.move_to_end(hop.peer)
        if len(self._proven) > PROVEN_REMEMBERED:
            self._proven.popitem(last=False)
        return channel

    async def _addresses(self, peer: PeerId) -> tuple[Address, ...]:
        if peer == self._node.peer:
            return self._node.addresses
        changes = self._registry.changes()
        if not (found := self._announced(peer) or self._proven.get(peer, ())):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KNOWN_TIMEOUT):
                    async for _ in changes:
                        if found := self._announced(peer):
                            break
        if not found:
            raise PeerUnreachableError("no record of the peer is known")
        return found

    def _announced(self, peer: PeerId) -> tuple[Address, ...]:
        info = self._registry.view().servers.get(peer)
        return info.dialable if info is not None else ()


PUSH_TIMEOUT = 20.0
"""Seconds in which the next server has to take in one step, or else to show that it lives: it may be at work
on those before."""


class Downstream:
    """Pushes steps to whichever stage is next, dialled when it is first needed and when it has changed."""

    def __init__(self, dialer: StageDialer, client: PeerId, counters: Counter[str]) -> None:
        """``client`` is the one on whose behalf."""
        self._dialer = dialer
        self._client = client
        self._counters = counters
        self._channel: Channel | None = None
        self._session = ""
        self._watching: asyncio.Task[None] | None = None

    async def dial(self, hop: Hop) -> bool:
        """Connect ahead of the first push; False when ``hop`` cannot be reached."""
        try:
            await self._channel_to(hop)
        except SwarmError:  # `StageDialer.connect` has logged why
            return False
        return True

    async def push(self, hop: Hop, step: Step, output: Tensor) -> None:
        """Send to ``hop``. Raise `UnavailableError` or `DeadlineExceededError` when it cannot be done."""
        channel = await self._channel_to(hop)

        def too_late() -> DeadlineExceededError:
            # Part of the message may be on its way: nothing can follow it.
            channel.abort("the stage took too long to take in a step")
            return DeadlineExceededError(
                f"{short(hop.peer)} did not take in a step within {PUSH_TIMEOUT:.0f} s"
            )

        async with (
            deadline_after(PUSH_TIMEOUT, too_late) as clock,
            running(self._prolong(clock, hop), "session push watch"),
        ):
            await channel.send(step, output)
        self._counters["steps_pushed"] += 1

    def abort_unless(self, hop: Hop | None) -> None:
        """End a push that hangs when the chain goes on elsewhere: the client knows of a failure by now."""
        if self._channel is not None and hop is not None and hop.session != self._session:
            self._channel.abort("the session goes on elsewhere")

    async def _prolong(self, clock: asyncio.Timeout, hop: Hop) -> None:
        """Give the next server more time whenever it shows that it lives."""
        while True:
            await asyncio.sleep(PUSH_TIMEOUT / 2)
            try:
                await self._dialer.probe(hop, least=PUSH_TIMEOUT / 10)
            except SwarmError as exc:
                if exc.origin is None:
                    continue
            with contextlib.suppress(RuntimeError):  # it is too late
                clock.reschedule(asyncio.get_running_loop().time() + PUSH_TIMEOUT)

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        await cancel_and_wait(self._watching)
        self._watching = None
        if channel is not None:
            await channel.close()

    async def _channel_to(self, hop: Hop) -> Channel:
        if self._channel is not None and self._session == hop.session:
            if self._watching is not None and not self._watching.done():
                return self._channel
            self._counters["pushes_redialled"] += 1
        await self.close()
        channel = await self._dialer.connect(hop, self._client)
        self._channel, self._session = channel, hop.session
        self._watching = asyncio.create_task(self._wait_for_end(channel))
        return channel

    async def _wait_for_end(self, channel: Channel) -> None:
        """The next stage never answers on this channel: whatever ends the wait means that it is gone."""
        try:
            await channel.receive()
        except SwarmError as exc:
            logger.debug("next stage %s is gone: %s", short(channel.remote), exc)
