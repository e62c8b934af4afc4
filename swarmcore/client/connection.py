"""A client's connection to a swarm: who serves what, how well, and sessions through them."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.pinging import Pinger, PingLimits
from swarmcore.client.served_models import ServedModel, find_served
from swarmcore.client.session.planner import SessionPlanner, random_session_id
from swarmcore.client.session.session import InferenceSession, SessionOptions, open_session
from swarmcore.errors import InputError, MissingBlocksError, PeerUnreachableError
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.lan import meet_neighbours
from swarmcore.routing.base import Router
from swarmcore.routing.chain import Chain
from swarmcore.routing.costs import ChainCost, CostModel, Latencies
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.routing.prefix_memory import PrefixMemory
from swarmcore.routing.step_codec import StepCodecs
from swarmcore.rpc.node import Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import ModelInfo, PeerId, Span, short
from swarmcore.wire.messages import InfoReply, InfoRequest
from swarmcore.wire.protocols import INFO_METHOD


class SwarmConnection:
    """What a client knows of a swarm that it has joined, and its sessions there; see `Swarm`, which is one.

    ``node`` and ``registry`` are owned: joining starts them, `close` closes them; not so with ``owned``
    false, for a client inside of a peer that runs them. The ``router`` is `LeastLatency` over ``latencies``
    unless another is given; servers are pinged within ``pings``. ``session_id`` makes up names of sessions,
    which nobody must be able to guess. With ``find_neighbours`` it joins through members on the local network
    as well.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        *,
        router: Router | None = None,
        latencies: Latencies | None = None,
        pings: PingLimits | None = None,
        rng: random.Random | None = None,
        session_id: Callable[[], str] = random_session_id,
        connect_again: Callable[[], SwarmConnection] | None = None,
        find_neighbours: bool = False,
        owned: bool = True,
    ) -> None:
        self.connect_again = connect_again
        """Makes another connection to the same swarm, under another name; None when that is not known."""
        self._rng = rng = rng or random.Random()
        self._owned = owned
        self.node = node
        self.registry = registry
        self.session_id = session_id
        self.latencies = latencies if latencies is not None else Latencies()
        """Round trips to servers, measured by pings while models are in use."""
        self.router = router or LeastLatency(rng, costs=CostModel(rtts=self.latencies.seconds))
        self.health = PeerHealth()
        """Which servers have failed of late."""
        self.prefixes = PrefixMemory()
        """Which chains have computed which beginnings of texts of late."""
        self.step_codecs = StepCodecs()
        """How fast links are, of all sessions whose codec is ``"auto"``."""
        self._pinger = Pinger(
            node, registry.view, self.latencies, self.health, rng=rng, admits=self.router.admits, limits=pings
        )
        self._find_neighbours = find_neighbours
        self._tasks = BackgroundTasks()
        self._users = AsyncExitStack()  # what is closed before the connection: models loaded over it
        self._joined = self._closed = False

    def __repr__(self) -> str:
        state = f"{len(self.registry.view())} peers seen" if self._joined else "not joined"
        return f"<{type(self).__name__} {'closed' if self._closed else state} by {short(self.node.peer)}>"

    def __await__(self) -> Generator[Any, None, Self]:
        """Join; the swarm, to be closed in the end."""
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        if self._closed:
            raise InputError("this swarm is closed; connect again")
        if self._joined:
            self.node.check_loop()
            return self
        try:
            if self._owned:
                await self.node.start()
                await self._join()
        except BaseException:
            await self.close()
            raise
        self._joined = True
        self._pinger.start()
        self._tasks.start(self._follow_health(), "peer health")
        return self

    def _check_joined(self) -> None:
        if not self._joined:
            raise InputError(
                "this swarm was never joined: write async with swarmcore.connect(…) as swarm, or "
                "swarm = await swarmcore.connect(…)"
            )

    async def _join(self) -> None:
        found = not self._find_neighbours or await meet_neighbours(self.node, self.registry)
        try:
            await self.registry.start()
        except InputError as exc:
            if found:
                raise
            raise PeerUnreachableError(
                "no member of a swarm was found on the local network; start one there with --mdns, or give "
                "the address of one elsewhere"
            ) from exc

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every session's connections, and the models loaded here. Harmless when repeated."""
        if self._joined:
            self.node.check_loop()
        self._closed = True
        await self._users.aclose()
        await self._pinger.close()
        await self._tasks.close()
        if self._owned:
            await self.registry.close()
            await self.node.close()

    def view(self) -> SwarmView:
        """Who serves what, as known now. Raise `InputError`, as all else does, when it was never joined."""
        self._check_joined()
        return self.registry.view()

    @property
    def paths(self) -> Mapping[PeerId, str]:
        """How peers called lately were reached: ``"direct"``, ``"hole-punched"`` or ``"relayed"``."""
        return self.node.paths

    def chain(
        self, model: ModelInfo, *, tokens: int = 0, blocked: Collection[PeerId] = (), span: Span | None = None
    ) -> Chain:
        """The chain that a session opened now would take. Raises as `Router.plan` does."""
        return self.router.plan(
            self.view(),
            model,
            span or model.span,
            tokens=tokens,
            blocked=blocked,
            banned=self.health.banned(asyncio.get_running_loop().time()),
        )

    def route(self, model: ModelInfo, chain: Chain) -> ChainCost:
        """What a token is expected to take through ``chain``, stage by stage; as text, a table."""
        cost = self.router.cost(self.view(), model, chain)
        if cost is None:  # not weighed by the router that is used
            least_latency = LeastLatency(random.Random(0), costs=CostModel(rtts=self.latencies.seconds))
            cost = least_latency.cost(self.view(), model, chain)
        return cost

    async def wait_for_blocks(self, model: ModelInfo, *, timeout: float) -> Chain:
        """Wait until servers cover every block of ``model``; return the chain.

        Raise `MissingBlocksError` when some are still missing after ``timeout`` seconds.
        """
        self._check_joined()
        self.node.check_loop()
        changes = self.registry.changes()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return self.chain(model)
                    except MissingBlocksError:
                        await anext(changes)
        except TimeoutError:
            return self.chain(model)

    async def open_session(
        self,
        model: ModelInfo,
        *,
        sequences: int = 1,
        max_tokens: int = 0,
        options: SessionOptions | None = None,
        adapter: AdapterWeights | None = None,
        prompts: Sequence[Sequence[int]] = (),
        namespace: str = "",
    ) -> InferenceSession:
        """Open a session through all blocks of ``model``, without torch: hidden states in, hidden states out.

        ``max_tokens`` is what each sequence is expected to grow to; servers without that much free cache are
        avoided, and grow the cache as it is needed. Its steps are computed with ``adapter`` besides the
        frozen weights. ``prompts`` are the tokens of each sequence whose rows will come first: what servers
        keep of these from earlier sessions of the same ``namespace`` is not computed again. The first
        session of a model waits for up to a second until its servers have been pinged. Raises as
        `swarmcore.client.session.session.open_session` does.
        """
        self._check_joined()
        self.node.check_loop()
        await self._pinger.follow(model)
        planner = self.planner(model, adapter=adapter, on_use=functools.partial(self._pinger.used, model))
        return await open_session(
            self.node,
            planner,
            model,
            sequences=sequences,
            tokens=sequences * max_tokens,
            options=options,
            prompts=prompts,
            namespace=namespace,
        )

    def planner(
        self,
        model: ModelInfo,
        *,
        adapter: AdapterWeights | None = None,
        on_use: Callable[[], None] = lambda: None,
    ) -> SessionPlanner:
        """What chooses the servers of ``model``'s sessions, and learns how they did."""
        self._check_joined()
        return SessionPlanner(
            self.registry,
            self.router,
            self.health,
            model,
            session_id=self.session_id,
            adapter=adapter,
            prefixes=self.prefixes,
            codecs=self.step_codecs,
            on_use=on_use,
        )

    def served(self, name: str | None = None) -> ServedModel | None:
        """The model of the swarm that ``name`` stands for, as `Swarm.load_model` finds it.

        None when ``name`` is not of the swarm's, but a source of its own. Raise `MissingBlocksError` when no
        model is served, `InputError` when it takes a name to tell which.
        """
        return find_served(self.view(), name, admits=self.router.admits)

    async def info(self, peer: PeerId, *, timeout: float = 5.0) -> InfoReply:
        """Ask a server of the view about itself. Raise `PeerUnreachableError` when it is not in the view."""
        server = self.view().servers.get(peer)
        if server is None:
            raise PeerUnreachableError(f"{peer} is not in this swarm")
        return await self.node.call(server.dialable, INFO_METHOD, InfoRequest(), timeout=timeout)

    async def _follow_health(self) -> None:
        """Tell `health` what servers announce: a fresh start forgives."""
        now = asyncio.get_running_loop().time
        changes = self.registry.changes()
        for info in self.view():
            self.health.update(Change("joined", info), now())
        async for change in changes:
            self.health.update(change, now())
