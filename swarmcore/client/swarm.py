"""A client's connection to a swarm."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import PassPlanner
from swarmcore.client.generation.chat import ThinChat
from swarmcore.client.generation.remote import (
    PATIENCE,
    HeadChoice,
    ThinGeneration,
    ThinRun,
    generate_at_heads,
)
from swarmcore.client.notebook import notebook_progress
from swarmcore.client.pinging import Pinger, PingLimits
from swarmcore.client.served_models import ServedModel, find_served
from swarmcore.client.session.planner import SwarmPlanner, random_session_id
from swarmcore.client.session.session import InferenceSession, SessionOptions, open_session
from swarmcore.errors import AddressError, InputError, MissingBlocksError, PeerUnreachableError
from swarmcore.generation_settings import GenerationOptions, GenerationSettings, open_generation
from swarmcore.identity import Identity, public_key
from swarmcore.imports import import_large
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.choice import RegistryChoice, make_registry
from swarmcore.registry.lan import meet_neighbours
from swarmcore.routing.chain import Chain, Router
from swarmcore.routing.costs import ChainCost, CostModel
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.latencies import Latencies
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.rpc.node import Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.transport import transport_class
from swarmcore.types import Address, ModelInfo, PeerId, Span, short
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import InfoReply, InfoRequest
from swarmcore.wire.protocols import INFO_METHOD

if TYPE_CHECKING:
    from swarmcore.checkpoint import Progress
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.prompts import Prompt

logger = logging.getLogger(__name__)

_MDNS = "libp2p"  # the transport whose peers are found that way


class Swarm:
    """What a client sees and does in a swarm. Made by `connect`, and then joined: ``async with connect(…) as
    swarm``, which closes it at the end, or ``swarm = await connect(…)``, after which you close it.

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
        again: Callable[[], Swarm] | None = None,
        find_neighbours: bool = False,
        owned: bool = True,
    ) -> None:
        self.again = again
        """Makes another connection to the same swarm, under another name; None when that is not known."""
        self._rng = rng = rng or random.Random()
        self._owned = owned
        self.node = node
        self.registry = registry
        self._session_id = session_id
        self.latencies = latencies if latencies is not None else Latencies()
        """Round trips to servers, measured by pings while models are in use."""
        self.router = router or LeastLatency(rng, costs=CostModel(rtts=self.latencies.seconds))
        self.health = PeerHealth()
        """Which servers have failed of late."""
        self._admits: Callable[[PeerId], bool] = (
            self.router.admits if isinstance(self.router, LeastLatency) else lambda peer: True
        )
        self._pinger = Pinger(
            node, registry.view, self.latencies, self.health, rng=rng, admits=self._admits, limits=pings
        )
        self._find_neighbours = find_neighbours
        self._tasks = BackgroundTasks()
        self._models: list[RemoteModel] = []
        self._joined = self._closed = False

    def __repr__(self) -> str:
        state = f"{len(self.registry.view())} peers seen" if self._joined else "not joined"
        return f"<Swarm {'closed' if self._closed else state} by {short(self.node.peer)}>"

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
        while self._models:
            await self._models.pop().close()
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
            span or Span(0, model.blocks),
            tokens=tokens,
            blocked=blocked,
            banned=self.health.banned(asyncio.get_running_loop().time()),
        )

    def route(self, model: ModelInfo, chain: Chain) -> ChainCost:
        """What a token is expected to take through ``chain``, stage by stage; as text, a table."""
        router = self.router
        if not isinstance(router, LeastLatency):
            router = LeastLatency(random.Random(0), costs=CostModel(rtts=self.latencies.seconds))
        return router.cost(self.view(), model, chain)

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
    ) -> InferenceSession:
        """Open a session through all blocks of ``model``, without torch: hidden states in, hidden states out.

        ``max_tokens`` is what each sequence is expected to grow to; servers without that much free cache are
        avoided, and grow the cache as it is needed. Its steps are computed with ``adapter`` besides the
        frozen weights. The first session of a model waits for up to a second
        until its servers have been pinged. Raises as `swarmcore.client.session.session.open_session` does.
        """
        self._check_joined()
        self.node.check_loop()
        await self._pinger.look_at(model)
        planner = SwarmPlanner(
            self.registry,
            self.router,
            self.health,
            model,
            session_id=self._session_id,
            adapter=adapter,
            on_use=functools.partial(self._pinger.used, model),
        )
        return await open_session(
            self.node, planner, model, sequences=sequences, tokens=sequences * max_tokens, options=options
        )

    def batch_runner(self, model: ModelInfo, options: PassOptions | None = None) -> BatchRunner:
        """What runs batches through blocks of ``model`` and back, without torch."""
        self._check_joined()
        sessions = SwarmPlanner(self.registry, self.router, self.health, model, session_id=self._session_id)
        planner = PassPlanner(self.registry, self.health, model, sessions, admits=self._admits)
        return BatchRunner(self.node, planner, model, options, pass_id=self._session_id)

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        adapter: str = "",
        patience: float = PATIENCE,
        **options: Unpack[GenerationOptions],
    ) -> ThinGeneration:
        """Continue a text, or answer chat messages, without torch and without any part of the model: a *head
        peer*, which was started with ``--serve-head``, runs tokenizer, embeddings, head and sampling.

        Iterate over its pieces as they come, or await it whole. ``model`` is a name or fingerprint, and may
        be left out where head peers offer only one; ``adapter`` is the name of one that servers have.
        ``options`` are those of `RemoteModel.generate`, but for ``logits_processors`` and
        ``chat_template_kwargs``. When the head peer fails, another one goes on with the same tokens; before
        the first of them each is tried once, later they are looked for for ``patience`` seconds.

        Raise `InputError` at once for settings out of range, and at the first piece for what the model does
        not take; `MissingHeadError` when nobody makes texts of the model, `BusyError` when all who do have no
        time, or else what the last of them raised.
        """
        self._check_joined()
        request = open_generation(prompt, GenerationSettings.of(options), adapter=adapter, rng=self._rng)
        choice = HeadChoice(model, self._rng, admits=self._admits)
        run = ThinRun(self.node, self.registry, self.health, choice, patience)
        return ThinGeneration(run, generate_at_heads(run, request))

    def head_model(self, model: str = "") -> ModelInfo:
        """The one of which head peers make texts when `generate` is given ``model``.

        Raise `InputError` when that may be several, `MissingHeadError` when no head peer is known.
        """
        return HeadChoice(model, self._rng, admits=self._admits).offer(self.view())

    def chat(self, *, system: str | None = None, model: str = "") -> ThinChat:
        """A conversation in which head peers answer: ``async for piece in chat.say("Hello")``."""
        self._check_joined()
        return ThinChat(self, system, model)

    async def load_model(
        self,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
        cache_dir: Path | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        progress: Progress | None = None,
    ) -> RemoteModel:
        """Load embeddings, head and tokenizer of a model, for its blocks to be run by the swarm.

        ``name_or_path`` is what servers were started with: a folder, a GGUF file or a hub id; or the name or
        fingerprint of a model that the swarm serves; or None for the only one that it serves. The latter two
        are loaded from the public place that their servers name, if what is there has their fingerprint.

        ``session_options`` say how the model's sessions travel: deadlines, codec, chunks of prompts;
        ``pass_options`` the same of batches through `RemoteModel.blocks`. Raise
        `ModelNotFoundError`, `CheckpointError`, `ModelMismatchError`, `MissingBlocksError` when nobody serves
        a model that could be meant, and `MissingExtraError` without the extra ``torch``. Servers of all its
        blocks are looked for when a session opens, not here. ``progress`` is called with what is being done,
        and how many bytes of how many, from another thread; in a notebook there are bars without it.
        """
        self._check_joined()
        self.node.check_loop()
        if progress is None:
            progress = notebook_progress()
        import_large("swarmcore.client.generation.model", progress=progress)
        from swarmcore.client.generation.model import RemoteModel

        if not isinstance(name_or_path, str | os.PathLike | None):
            raise InputError(f"a model is named by a text or a path; got {name_or_path!r:.80}")
        model = await RemoteModel.load(
            self,
            None if name_or_path is None else os.fspath(name_or_path),
            dtype=dtype,
            revision=revision,
            threads=threads,
            cache_dir=cache_dir,
            session_options=session_options,
            pass_options=pass_options,
            progress=progress,
        )
        self._models.append(model)
        return model

    def served(self, name: str | None = None) -> ServedModel | None:
        """The model of the swarm that ``name`` stands for, as `load_model` finds it.

        None when ``name`` is not of the swarm's, but a source of its own. Raise `MissingBlocksError` when no
        model is served, `InputError` when it takes a name to tell which.
        """
        return find_served(self.view(), name, admits=self._admits)

    async def info(self, peer: PeerId, *, timeout: float = 5.0) -> InfoReply:
        """Ask a server of the view about itself. Raise `PeerUnreachableError` when it is not in the view."""
        server = self.view().servers.get(peer)
        if server is None:
            raise PeerUnreachableError(f"{peer} is not in this swarm")
        addresses = [Address.parse(url) for url in server.addresses]
        return await self.node.call(addresses, INFO_METHOD, InfoRequest(), timeout=timeout)

    async def _follow_health(self) -> None:
        """Tell `health` what servers announce: a fresh start forgives."""
        now = asyncio.get_running_loop().time
        changes = self.registry.changes()
        for info in self.view():
            self.health.update(Change("joined", info), now())
        async for change in changes:
            self.health.update(change, now())


def connect(
    *bootstrap: str,
    identity: Identity | None = None,
    transports: Sequence[str] = (),
    transport_options: Mapping[str, Mapping[str, Any]] | None = None,
    mdns: bool = False,
    registry: RegistryChoice = "gossip",
    allowed_servers: Collection[PeerId] | None = None,
    blocked_servers: Collection[PeerId] = (),
    max_hops: int | None = None,
    limits: Limits | None = None,
) -> Swarm:
    """A swarm that any of the ``bootstrap`` addresses is a member of. Join it: ``async with connect(…) as
    swarm``, or ``swarm = await connect(…)``.

    ``transports`` are schemes to have besides those of the bootstrap addresses, ``transport_options`` the
    keyword arguments of their constructors, by scheme (what is named there, the swarm has, too). With
    ``mdns`` members are looked for on the local network, too, over libp2p, and no address is needed.
    ``registry`` is the one that the swarm's members run, by its name or itself. ``allowed_servers``, when
    given, are the only peers whose blocks are used; those of ``blocked_servers`` never are. Chains have at
    most ``max_hops`` servers. Raise `AddressError` for a bad address or peer id,
    `UnknownTransportError` and `MissingExtraError` for a transport that is not installed; joining raises
    `PeerUnreachableError` when no bootstrap peer answers.
    """
    if not bootstrap and not mdns:
        raise AddressError(
            "connect needs the address of at least one member of the swarm, or mdns=True to look for one on "
            "the local network"
        )
    addresses = [Address.parse(url) for url in bootstrap]
    for peer in (*(allowed_servers or ()), *blocked_servers):
        public_key(peer)
    identity = identity or Identity.generate()
    options = transport_options or {}
    schemes = dict.fromkeys(
        [*(a.scheme for a in addresses), *transports, *options, *([_MDNS] if mdns else [])]
    )
    backends = [
        transport_class(scheme)(identity, limits=limits, **options.get(scheme, {})) for scheme in schemes
    ]
    node = Node(identity, backends, limits=limits)
    latencies = Latencies()
    router = LeastLatency(
        random.Random(),
        costs=CostModel(rtts=latencies.seconds),
        allowed=allowed_servers,
        blocked=blocked_servers,
        max_hops=max_hops,
    )
    again = functools.partial(
        connect,
        *bootstrap,
        transports=transports,
        transport_options=transport_options,
        mdns=mdns,
        registry=registry,
        allowed_servers=allowed_servers,
        blocked_servers=blocked_servers,
        max_hops=max_hops,
        limits=limits,
    )
    return Swarm(
        node,
        make_registry(registry, node, addresses, member=False),
        router=router,
        latencies=latencies,
        again=again,
        find_neighbours=mdns,
    )
