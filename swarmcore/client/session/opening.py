"""Opening a session's stages: choosing servers, and being granted a session on each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import attrs

from swarmcore.client.adapters import AdapterWeights
from swarmcore.errors import DeadlineExceededError, ProtocolError, SwarmError
from swarmcore.routing.chain import Chain, Stage
from swarmcore.rpc.asking import ask
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.types import Address, ModelInfo, PeerId, Span, short
from swarmcore.wire.messages import Hop, OpenSession, Ping, SessionOpened
from swarmcore.wire.passes import AdapterWanted
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
class Comparison:
    """A session's chain, and the one it would take if it opened now."""

    current: float
    """Expected seconds of a token over the chain that it has."""
    better: float
    """The same over the best one."""
    chain: Chain
    """The best one."""
    replay: float
    """Expected seconds to fill the caches of its new servers."""


class Planner(Protocol):
    """Chooses the servers of one model's sessions, and hears how they did."""

    adapter: AdapterWeights | None
    """What the sessions are computed with besides the frozen weights."""

    def plan(
        self,
        span: Span,
        *,
        tokens: int = 0,
        blocked: Collection[PeerId] = (),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        """A chain for ``span``, as `Router.plan` gives it on what is known now."""

    def compare(self, chain: Chain, *, tokens: int = 0) -> Comparison | None:
        """A live session's chain beside the best there is for it; None when chains are not weighed here."""

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """A server failed a session."""

    def worked(self, peer: PeerId) -> None:
        """A server has done a step of a session."""

    def session_id(self) -> str:
        """A new session id: 32 random hex digits."""


@attrs.frozen
class OpenStage:
    """A stage whose server has granted the session."""

    stage: Stage
    hop: Hop
    channel: Channel
    next_hop_reachable: bool


async def open_chain(
    node: Node,
    planner: Planner,
    model: ModelInfo,
    span: Span,
    *,
    sequences: int,
    tokens: int,
    reserve: int = 0,
    timeout: float,
    after: Hop | None = None,
    before: Hop | None = None,
    blocked: Collection[PeerId] = (),
    heir_of: PeerId | None = None,
    attempts: int = ATTEMPTS,
) -> list[OpenStage]:
    """Open a session on every server of a chain for ``span``, all at once, between two other stages.

    Servers with room for ``tokens`` tokens of cache are preferred, and room for ``reserve`` is set aside at
    once. ``heir_of`` is a server that will hand its caches over to the first. One that refuses, or that is
    silent for longer than is usual for it while others have its blocks, is avoided in the next of
    ``attempts``, each of ``timeout`` seconds; until so many have passed since the first, there may be up to
    `MOST_ATTEMPTS`. Raise what `Planner.plan` raises when there is no chain, and the last
    server's error when no other chain is left or the attempts are used up.
    """
    avoided = set(blocked)
    failure: SwarmError | None = None
    refused = ""
    now = asyncio.get_running_loop().time
    began, tried = now(), 0
    while tried < attempts or (tried < MOST_ATTEMPTS and now() < began + timeout):
        tried += 1
        try:
            chain = planner.plan(
                span,
                tokens=tokens,
                blocked=frozenset(avoided),
                after=after.peer if after else None,
                before=before.peer if before else None,
            )
        except SwarmError as exc:
            if failure is None:
                raise
            blocks = ", ".join(exc.details.get("ranges", [str(span)]))
            raise located(refused, failure, f"nobody else has blocks {blocks}") from exc
        opened = await open_stages(
            node,
            planner,
            model,
            chain,
            sequences=sequences,
            reserve=reserve,
            timeout=timeout,
            after=after,
            before=before,
            heir_of=heir_of,
        )
        if not isinstance(opened, Refusals):
            return opened
        peer, failure = next(iter(opened.items()))
        refused = short(peer)
        avoided.update(opened)
    assert failure is not None
    raise located(refused, failure, f"after {tried} attempts with others")


class Refusals(dict[PeerId, SwarmError]):
    """Why servers of a chain did not grant a session; nothing was opened on the others."""


async def open_stages(
    node: Node,
    planner: Planner,
    model: ModelInfo,
    chain: Chain,
    *,
    sequences: int,
    reserve: int,
    timeout: float,
    after: Hop | None = None,
    before: Hop | None = None,
    heir_of: PeerId | None = None,
) -> list[OpenStage] | Refusals:
    """Open a session on every server of this one chain, or on none of them; as `open_chain` otherwise."""
    hops = [_hop(stage, planner.session_id()) for stage in chain.stages]
    first = [after.peer] if after is not None else []
    if heir_of is not None:
        first.append(heir_of)
    upstream = [tuple(first), *((hop.peer,) for hop in hops)]
    results = await _open_all(
        node,
        planner,
        model,
        chain,
        [*hops, before],
        upstream=upstream,
        sequences=sequences,
        reserve=reserve,
        timeout=timeout,
    )
    opened = [result for result in results if isinstance(result, OpenStage)]
    if len(opened) == len(chain):
        return opened
    for stage in opened:
        stage.channel.abort("another server refused the session")
    refusals = Refusals()
    for hop, result in zip(hops, results, strict=True):
        if isinstance(result, SwarmError):
            logger.info("%s refused a session: %s", short(hop.peer), result)
            planner.failed(hop.peer, result)
            refusals[hop.peer] = result
    return refusals


def located(where: object, error: SwarmError, remark: str = "") -> SwarmError:
    """``error`` with the server it comes from in its message."""
    located = type(error)(f"{where}: {error.message}{remark and f' ({remark})'}", **error.details)
    located.origin = error.origin
    return located


def _hop(stage: Stage, session: str) -> Hop:
    return Hop(stage.server.peer, stage.server.addresses, session, stage.span.start, stage.span.end)


async def _open_all(
    node: Node,
    planner: Planner,
    model: ModelInfo,
    chain: Chain,
    hops: Sequence[Hop | None],
    *,
    upstream: Sequence[tuple[PeerId, ...]],
    sequences: int,
    reserve: int,
    timeout: float,
) -> list[OpenStage | SwarmError | None]:
    """What comes of each stage; None where it was not waited for, because another one will not do."""
    now, adapter = asyncio.get_running_loop().time, planner.adapter

    async def open_one(
        stage: Stage,
        hop: Hop,
        next_hop: Hop | None,
        upstream: tuple[PeerId, ...],
        progressed: Callable[[], None],
    ) -> OpenStage:
        opening = OpenSession(
            hop.session,
            model.fingerprint,
            hop.start,
            hop.end,
            sequences,
            reserve,
            next_hop,
            adapter=adapter.name if adapter else None,
            pushers=upstream,
        )
        addresses = [Address.parse(url) for url in hop.addresses]
        channel = await node.open(addresses, INFERENCE_PROTOCOL, opening, timeout=timeout)
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
        return OpenStage(stage, hop, channel, granted.next_hop_reachable)

    async def guarded(
        stage: Stage, hop: Hop, next_hop: Hop | None, upstream: tuple[PeerId, ...]
    ) -> OpenStage | SwarmError:
        silent: list[SwarmError] = []

        async def watch() -> None:
            silent.append(await _silence(node, planner, hop))
            clock.reschedule(now())

        clock = asyncio.timeout(timeout)
        watching: asyncio.Task[None] | None = None
        try:
            async with clock:
                watching = asyncio.create_task(watch(), name="session opening watch")
                return await open_one(
                    stage, hop, next_hop, upstream, lambda: clock.reschedule(now() + timeout)
                )
        except TimeoutError:
            return (*silent, DeadlineExceededError(f"no session was granted in {timeout:.0f} s"))[0]
        except SwarmError as exc:
            return exc
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    tasks = [
        asyncio.create_task(guarded(stage, hop, next_hop, admitted), name="session opening")
        for stage, hop, next_hop, admitted in zip(chain.stages, hops, hops[1:], upstream, strict=False)
        if hop is not None
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


def alone(planner: Planner, peer: PeerId, span: Span) -> bool:
    """Whether nobody but ``peer`` has the blocks ``span``."""
    try:
        planner.plan(span, blocked=frozenset([peer]))
    except SwarmError:
        return True
    return False


async def _silence(node: Node, planner: Planner, hop: Hop) -> SwarmError:
    """Ask the server of ``hop`` whether it lives for as long as it does; return what it is when it does not.

    One whose blocks nobody else has is given time to come back. What keeps it from being asked is not for
    this to say: the opening itself ends in the same error.
    """
    addresses = [Address.parse(url) for url in hop.addresses]
    pause = ASK_AFTER
    while True:
        await asyncio.sleep(pause)
        pause = min(2 * pause, 8 * ASK_AFTER)
        try:
            await ask(node, addresses, PING_METHOD, Ping())
        except DeadlineExceededError as exc:
            if exc.origin is None and not alone(planner, hop.peer, Span(hop.start, hop.end)):
                return exc
        except SwarmError as exc:
            logger.debug("%s could not be asked whether it lives: %s", short(hop.peer), exc)
