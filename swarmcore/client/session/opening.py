"""Opening a session's stages: choosing servers, and being granted a session on each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

import attrs

from swarmcore.client.session.planner import SessionPlanner
from swarmcore.client.session.prefix import SessionPrefix
from swarmcore.errors import DeadlineExceededError, ProtocolError, SwarmError
from swarmcore.pacing import Backoff
from swarmcore.routing.chain import Chain, Stage
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import probe
from swarmcore.tasks import running
from swarmcore.types import Address, ModelInfo, Numerics, PeerId, Span, short
from swarmcore.wire.forward_backward import AdapterWanted
from swarmcore.wire.messages import Hop, OpenSession, Ping, SessionOpened
from swarmcore.wire.protocols import INFERENCE_PROTOCOL, PING_METHOD

logger = logging.getLogger(__name__)

ATTEMPTS = 3
ASK_AFTER = 0.5
"""Seconds without an answer to an opening after which a server is asked whether it lives, again and again."""

GRACE = 0.2
"""Seconds that the other servers of a chain get to refuse as well, once one has."""

MOST_ATTEMPTS = 8
"""Chains that are tried when their servers refuse at once: many may have died in the same moment."""


@attrs.frozen
class OpenStage:
    """A stage whose server has granted the session."""

    stage: Stage
    hop: Hop
    channel: Channel
    next_hop_reachable: bool
    cached: tuple[int, ...] = ()
    """Tokens that it has of each sequence, computed before; empty for servers that know nothing of that."""
    max_in_flight: int = 0
    """Steps that it takes in at a time and can be told to drop; 0 for servers that know nothing of that."""


class Refusals(dict[PeerId, SwarmError]):
    """Why servers of a chain did not grant a session; nothing was opened on the others."""


@attrs.frozen(kw_only=True)
class ChainOpener:
    """Opens a session on every server of a chain, all at once, within ``timeout`` seconds.

    The chain stands ``after`` and ``before`` two other stages, None for the client itself. Cache for
    ``reserve`` tokens is set aside at once. ``caches_from`` is a server that will send its caches to the
    first one.
    """

    node: Node
    planner: SessionPlanner
    model: ModelInfo
    sequences: int
    timeout: float
    reserve: int = 0
    after: Hop | None = None
    before: Hop | None = None
    caches_from: PeerId | None = None
    like: Numerics | None = None
    """How the new servers should compute, if there are such."""
    prefix: SessionPrefix | None = None
    """What the sequences consist of, so far."""

    async def open_best(
        self, span: Span, *, tokens: int, blocked: Collection[PeerId] = (), attempts: int = ATTEMPTS
    ) -> list[OpenStage]:
        """Open the best chain there is for ``span``.

        Servers with room for ``tokens`` tokens of cache are preferred. One that refuses, or that is silent
        for longer than is usual for it while others have its blocks, is avoided in the next of ``attempts``;
        until `timeout` has passed since the first, there may be up to `MOST_ATTEMPTS`. Raise what
        `SessionPlanner.plan` raises when there is no chain, and the last server's error when no other chain
        is left or the attempts are used up.
        """
        avoided = set(blocked)
        failure: SwarmError | None = None
        refused = ""
        now = asyncio.get_running_loop().time
        began, tried = now(), 0
        while tried < attempts or (tried < MOST_ATTEMPTS and now() < began + self.timeout):
            tried += 1
            try:
                chain = self.planner.plan(
                    span,
                    tokens=tokens,
                    blocked=frozenset(avoided),
                    after=self.after.peer if self.after else None,
                    before=self.before.peer if self.before else None,
                    like=self.like,
                )
                if self.prefix is not None and len(span) == self.model.blocks:
                    chain = self.planner.begun(chain, self.prefix, tokens=tokens, blocked=avoided)
            except SwarmError as exc:
                if failure is None:
                    raise
                blocks = ", ".join(exc.details.get("ranges", [str(span)]))
                raise located(refused, failure, f"nobody else has blocks {blocks}") from exc
            opened = await self.open_given(chain)
            if not isinstance(opened, Refusals):
                return opened
            peer, failure = next(iter(opened.items()))
            refused = short(peer)
            avoided.update(opened)
        assert failure is not None
        raise located(refused, failure, f"after {tried} attempts with others")

    async def open_given(self, chain: Chain) -> list[OpenStage] | Refusals:
        """Open every server of this one chain, or none of them."""
        hops = [
            Hop(s.server.peer, s.server.addresses, self.planner.session_id(), s.span.start, s.span.end)
            for s in chain.stages
        ]
        before_first = (self.after.peer if self.after else None, self.caches_from)
        upstream = [tuple(peer for peer in before_first if peer), *((hop.peer,) for hop in hops)]
        adapter = self.planner.adapter
        names = self.prefix.names(chain) if self.prefix is not None else ()
        requests = [
            OpenSession(
                hop.session,
                self.model.fingerprint,
                hop.start,
                hop.end,
                self.sequences,
                self.reserve,
                next_hop,
                adapter=adapter.name if adapter else None,
                pushers=allowed,
                names=names,
            )
            for hop, next_hop, allowed in zip(hops, [*hops[1:], self.before], upstream, strict=False)
        ]
        results = await self._open_all(chain, hops, requests)
        opened = [result for result in results if isinstance(result, OpenStage)]
        if len(opened) == len(chain):
            return opened
        for stage in opened:
            stage.channel.abort("another server refused the session")
        refusals = Refusals()
        for hop, result in zip(hops, results, strict=True):
            if isinstance(result, SwarmError):
                logger.info("%s refused a session: %s", short(hop.peer), result)
                self.planner.failed(hop.peer, result)
                refusals[hop.peer] = result
        return refusals

    async def _open_all(
        self, chain: Chain, hops: list[Hop], requests: list[OpenSession]
    ) -> list[OpenStage | SwarmError | None]:
        """What comes of each stage; None where it was not waited for, because another one will not do."""
        tasks = [
            asyncio.create_task(self._open(*each), name="session opening")
            for each in zip(chain.stages, hops, requests, strict=True)
        ]
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if any(isinstance(task.result(), SwarmError) for task in done):
                    break
            if pending:  # a server that is well may wait for the one that is not: it dials who follows it
                await asyncio.wait(pending, timeout=GRACE)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return [None if task.cancelled() else task.result() for task in tasks]
        except BaseException:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, OpenStage):
                    result.channel.abort("the session was not opened")
            raise

    async def _open(self, stage: Stage, hop: Hop, request: OpenSession) -> OpenStage | SwarmError:
        """Be granted a session on one server; the error when it refuses, or is silent."""
        now = asyncio.get_running_loop().time
        silent: list[SwarmError] = []

        async def watch() -> None:
            silent.append(await self._until_silent(hop))
            clock.reschedule(now())

        try:
            async with asyncio.timeout(self.timeout) as clock, running(watch(), "session opening watch"):
                return await self._granted(
                    stage, hop, request, lambda: clock.reschedule(now() + self.timeout)
                )
        except TimeoutError:
            return (*silent, DeadlineExceededError(f"no session was granted in {self.timeout:.0f} s"))[0]
        except SwarmError as exc:
            return exc

    async def _granted(
        self, stage: Stage, hop: Hop, request: OpenSession, progressed: Callable[[], None]
    ) -> OpenStage:
        adapter = self.planner.adapter
        addresses = Address.parse_all(hop.addresses)
        channel = await self.node.open(addresses, INFERENCE_PROTOCOL, request, timeout=self.timeout)
        try:
            granted = (await channel.receive()).record
            if isinstance(granted, AdapterWanted) and adapter is not None:
                blocks = [block for block in granted.blocks if block in stage.span]
                await adapter.send(channel, blocks, progressed=progressed)
                granted = (await channel.receive()).record
            if not isinstance(granted, SessionOpened):
                raise ProtocolError(
                    f"server {hop.peer} answered {type(granted).__name__} to the opening of a session"
                )
        except BaseException:
            channel.abort("the session was not opened")
            raise
        cached = granted.cached if len(granted.cached) == self.sequences and min(granted.cached) >= 0 else ()
        return OpenStage(
            stage, hop, channel, granted.next_hop_reachable, cached, max(granted.max_in_flight, 0)
        )

    async def _until_silent(self, hop: Hop) -> SwarmError:
        """Probe a server again and again; return the error once it no longer answers.

        One whose blocks nobody else has is given time to come back. What keeps it from being asked is not for
        this to say: the opening itself ends in the same error.
        """
        addresses = Address.parse_all(hop.addresses)
        pauses = Backoff(ASK_AFTER, 8 * ASK_AFTER)
        while True:
            await asyncio.sleep(pauses.next())
            try:
                await probe(self.node, addresses, PING_METHOD, Ping())
            except DeadlineExceededError as exc:
                if exc.origin is None and not self.planner.alone(hop.peer, Span(hop.start, hop.end)):
                    return exc
            except SwarmError as exc:
                logger.debug("%s could not be asked whether it lives: %s", short(hop.peer), exc)


def located(where: object, error: SwarmError, remark: str = "") -> SwarmError:
    """``error`` with the server it comes from in its message."""
    located = type(error)(f"{where}: {error.message}{remark and f' ({remark})'}", **error.details)
    located.origin = error.origin
    return located
