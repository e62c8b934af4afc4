"""Which servers the batches of one model go to, and in which codec.

They are shared out by speed, without servers that fail; the codec is always the same one, or what the link to
each server allows.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from swarmcore.client.autograd.rpc import PassResult
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.errors import InvalidBatchError, MissingBlocksError, SwarmError
from swarmcore.registry.base import Registry
from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.coverage import left_out
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.link_codec import LinkCodec, TensorKind
from swarmcore.routing.shares import ThroughputShares
from swarmcore.types import ADAPTERS, TRAINING, ModelInfo, PeerId, ServerInfo, Span, short
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.tensors import Tensor

PassKind = Literal["forward", "backward"]
Work = Literal["forward", "backward", "both"]
"""What a server will do on a micro-batch: a pass, or one there and one back."""

SMOOTHING = 0.2
"""Weight of a pass among those that went before."""

BACKWARD = 3.0
"""What a backward pass takes in forward passes, one to compute the activations again, until it is known."""

CAPACITY = 2048
"""Speeds that are remembered; one more takes the place of the one that was measured longest ago."""


class ServerSpeeds:
    """Seconds of a token through a block, by server, forward and backward apart.

    What servers announce counts beside what is measured of others as far as announcements are right on the
    whole: all are multiplied by what the median of the measured ones is off by.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[PeerId, PassKind], float] = {}
        self._announced: dict[PeerId, float] = {}

    def __len__(self) -> int:
        """Servers that have been measured."""
        return len({peer for peer, _ in self._seconds})

    def worked(self, server: ServerInfo, kind: PassKind, tokens: int, blocks: int, seconds: float) -> None:
        """``server`` was at work on a pass of ``tokens`` through ``blocks`` for so long.

        Values that cannot be are passed over: they come from the other side.
        """
        if not 0 < seconds < math.inf or not tokens or not blocks:
            return
        now = seconds / (tokens * blocks)
        before = self._seconds.pop((server.peer, kind), now)
        self._seconds[server.peer, kind] = before + SMOOTHING * (now - before)
        if announced := announced_seconds(server):
            self._announced[server.peer] = announced
        if len(self._seconds) > CAPACITY:
            oldest, _ = next(iter(self._seconds))
            self._seconds.pop((oldest, "forward"), None)
            self._seconds.pop((oldest, "backward"), None)
            self._announced.pop(oldest, None)

    def seconds(self, servers: list[ServerInfo], work: Work) -> dict[PeerId, float]:
        """Seconds that each of ``servers`` needs for ``work`` on a token, for each block.

        Those of which nothing is known count like the slowest of the others.
        """
        ratio, error = self._ratio(), self._error()
        found: dict[PeerId, float] = {}
        for server in servers:
            forward = self._seconds.get((server.peer, "forward"))
            back = self._seconds.get((server.peer, "backward"))
            if forward is None:
                forward = back / ratio if back is not None else announced_seconds(server) * error
            if back is None:
                back = forward * ratio
            found[server.peer] = {"forward": forward, "backward": back, "both": forward + back}[work]
        slowest = max(found.values(), default=0.0) or 1.0
        return {peer: seconds or slowest for peer, seconds in found.items()}

    def _ratio(self) -> float:
        """What a backward pass takes, in forward passes."""
        both = [
            back / forward
            for (peer, kind), back in self._seconds.items()
            if kind == "backward" and (forward := self._seconds.get((peer, "forward")))
        ]
        return statistics.median(both) if both else BACKWARD

    def _error(self) -> float:
        """What a forward pass really takes, in what is announced."""
        errors = [
            seconds / self._announced[peer]
            for (peer, kind), seconds in self._seconds.items()
            if kind == "forward" and peer in self._announced
        ]
        return statistics.median(errors) if errors else 1.0


def announced_seconds(server: ServerInfo) -> float:
    """Of a token through a block, forward, as ``server`` announces; 0 when it announces nothing."""
    rate = server.forward_rps or server.throughput
    return 1 / (rate * len(server.span)) if rate > 0 and server.span else 0.0


class BatchPlanner:
    """Gives every micro-batch a chain, so that each server has work in proportion to its measured speed.

    Until a server has done a pass, its speed is what it announces.
    """

    def __init__(
        self,
        registry: Registry,
        health: PeerHealth,
        model: ModelInfo,
        sessions: SessionPlanner,
        *,
        admits: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        """``sessions`` is told of failures, as it is of those of sessions."""
        self._registry, self._health, self._model = registry, health, model
        self._sessions, self._admits = sessions, admits
        self._shares = ThroughputShares(model)
        self._speeds = ServerSpeeds()

    def __repr__(self) -> str:
        return f"<BatchPlanner {self._model.name} · {len(self._speeds)} servers measured>"

    @property
    def servers(self) -> int:
        """How many take batches now."""
        return sum(_takes(server, 1, None) for server in self._online())

    def chain(
        self,
        span: Span,
        *,
        tokens: int = 0,
        adapter: AdapterName | None = None,
        avoid: Collection[PeerId] = (),
        work: Work = "forward",
    ) -> Chain:
        """A chain for the next micro-batch of ``tokens`` through ``span``; its servers are charged with it.

        Servers of ``avoid``, and those banned, are gone without unless nobody else has the blocks. Those that
        take no batch of that size, or neither serve the ``adapter`` nor take it from clients, are never
        asked. Raise `MissingBlocksError`, and `InvalidBatchError` when no server at all takes so many tokens
        at a time.
        """
        servers = self._online()
        # All keep their place, also those that this micro-batch goes without.
        self._shares.follow(servers)
        seconds = self._speeds.seconds(servers, work)
        for server in servers:
            if server.span:
                self._shares.add(server, 1 / (seconds[server.peer] * len(server.span)))
        able = [server for server in servers if _takes(server, tokens, adapter)]
        unable = {server.peer for server in servers} - {server.peer for server in able}
        shunned = {*self._health.banned(asyncio.get_running_loop().time()), *avoid}
        amount = max(tokens, 1)
        if shunned:
            try:
                return self._shares.next_chain(span, amount, unable | shunned)
            except MissingBlocksError:
                pass
        try:
            return self._shares.next_chain(span, amount, unable)
        except MissingBlocksError as exc:
            most = max((server.pass_tokens for server in servers), default=0)
            if tokens > most > 0:
                raise InvalidBatchError(
                    f"a micro-batch of {tokens} tokens, and the servers run {most} at most; "
                    f"lower PassOptions.micro_batch_tokens and shorten what is longer, or raise the servers' "
                    f"--max-pass-tokens",
                    pass_tokens=most,
                ) from None
            such = f" with the adapter {adapter.name!r}" if adapter is not None and adapter.name else ""
            others = ", ".join(f"{short(server.peer)} {server.span}" for server in able[:4])
            found = f"those that do hold other blocks: {others}" if able else "none that is online does"
            out = left_out(servers, _needed(adapter))
            raise MissingBlocksError(f"{exc.message}{such}; {found}{out}", **exc.details) from None

    def worked(self, stage: Stage, kind: PassKind, tokens: int, seconds: float) -> None:
        """A server was at work on a pass of ``tokens`` tokens for so many seconds."""
        self._sessions.worked(stage.server.peer)
        self._speeds.worked(stage.server, kind, tokens, len(stage.span), seconds)

    def failed(self, peer: PeerId, error: SwarmError) -> None:
        """A server failed a pass."""
        self._sessions.failed(peer, error)

    def _online(self) -> list[ServerInfo]:
        return [
            server
            for server in self._registry.view()
            if server.state == "online"
            and server.model is not None
            and server.model.fingerprint == self._model.fingerprint
            and self._admits(server.peer)
        ]


def _takes(server: ServerInfo, tokens: int, adapter: AdapterName | None) -> bool:
    if server.pass_tokens < max(tokens, 1) or not set(_needed(adapter)) <= set(server.capabilities):
        return False
    return adapter is None or not adapter.name or adapter.name in server.adapters


def _needed(adapter: AdapterName | None) -> list[str]:
    return [TRAINING] if adapter is None else [TRAINING, ADAPTERS]


class BatchCodecs:
    """Chooses codecs, and learns from each pass. ``codec`` is for all rows, or ``"auto"``, by ``links``."""

    def __init__(self, codec: str, links: LinkCodec | None = None) -> None:
        self._fixed = codec
        self._links: LinkCodec | None = None
        if codec == "auto":
            self._links = LinkCodec() if links is None else links

    def __repr__(self) -> str:
        return f"<BatchCodecs {self._links or self._fixed}>"

    def choose(
        self, peer: PeerId, kind: TensorKind, rows: Tensor, now: float, chain: Iterable[PeerId] = ()
    ) -> tuple[str, str]:
        """The codecs for ``rows`` to ``peer`` and for as many that come back.

        ``chain`` is every server that the micro-batch passes through.
        """
        if self._links is None:
            return self._fixed, self._fixed
        peers = tuple(chain)
        up = self._links.codec(peer, "up", kind, rows.dtype, rows.shape, now, chain=peers)
        down = self._links.codec(peer, "down", kind, rows.dtype, rows.shape, now, chain=peers)
        return up, down

    def done(self, peer: PeerId, kind: TensorKind, rows: Tensor, result: PassResult, now: float) -> None:
        """A pass of ``rows`` has come to its end."""
        if self._links is None:
            return
        self._links.transferred(peer, "up", result.up.nbytes, result.up.seconds, now)
        self._links.transferred(peer, "down", result.down.nbytes, result.down.seconds, now)
        self._links.computed(peer, kind, rows.shape, result.seconds, now)

    def refused(self, peer: PeerId, codecs: Iterable[str]) -> bool:
        """``peer`` does not know one of ``codecs``. Return whether others will now be chosen for it."""
        suspects = [codec for codec in codecs if codec != "raw"]
        if self._links is None or not suspects:
            return False
        # The server does not say which of them; and another micro-batch may have been refused just before.
        for codec in suspects:
            if self._links.refused(peer, codec):
                break
        return True

    def knows(self, peer: PeerId, codec: str) -> bool:
        """Whether ``peer`` has not refused ``codec``, as far as choices are made here."""
        return self._links is None or self._links.knows(peer, codec)
