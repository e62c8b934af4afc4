"""Starts servers: from settings to a running block server or bootstrap peer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from swarmcore.distribution import version
from swarmcore.errors import AddressInUseError, InputError, PeerUnreachableError
from swarmcore.head.model import HeadConfig, serving_head
from swarmcore.head.service import HeadService
from swarmcore.identity import Identity
from swarmcore.placement.choice import join_span
from swarmcore.registry.base import Registry
from swarmcore.registry.choice import RegistryChoice, make_registry
from swarmcore.registry.lan import PATIENCE, follow_addresses, meet_neighbours
from swarmcore.resources.hold_ups import watching
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import Weights
from swarmcore.server.allow_file import AllowFile
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.loading import (
    check_span,
    default_activation_budget,
    default_cache_tokens,
    open_model,
    plan_blocks,
    read_adapter,
    speed_file,
)
from swarmcore.server.measuring import ServerSpeed, SpeedFile, measure_compute, measure_network
from swarmcore.sources import announced_source
from swarmcore.transport import transport_class
from swarmcore.types import Address, PeerId, ServerInfo, Span
from swarmcore.wire.messages import InfoReply, InfoRequest, Ping, Pong
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import INFO_METHOD, PING_METHOD
from swarmcore.wire.tensors import ITEM_BYTES

if TYPE_CHECKING:
    from swarmcore.executor.base import BlockExecutor
    from swarmcore.executor.loader import BlockLoader, Progress
    from swarmcore.placement.capacity import CapacityPlan

logger = logging.getLogger(__name__)

BOOTSTRAP_TTL = 300.0
"""Seconds for which a bootstrap peer's announcement is believed that is not renewed."""


DEFAULT_PORT = 7927
"""Where servers listen that were not told where: SWCR on a telephone's keys."""
PORTS_TRIED = 16
"""Ports from that one on that are tried before any free one is taken; each transport has its own."""
PORT = "{port}"

NETWORK_PATIENCE = 120.0
"""Seconds for which a server that has no address but loopback tries to join peers elsewhere."""
NETWORK_PAUSE = 5.0
"""Seconds after which it tries again although no address has come up."""


@attrs.frozen(kw_only=True)
class NetworkConfig:
    """Where a server listens and whom it joins."""

    transports: Mapping[str, Sequence[str]]
    """Transport schemes, each with the places to listen on in that transport's notation; ``{port}`` in them
    is `DEFAULT_PORT`, or the next one that is free."""
    announce: Sequence[str] = ()
    """Addresses to announce instead of those found, for a host behind a forwarded port."""
    bootstrap: Sequence[str] = ()
    """Addresses of members of the swarm; none for the first one."""
    allowed_peers: Collection[PeerId] | None = None
    """The only peers that may call this one; None for everyone."""
    allow_file: AllowFile | None = None
    """Where they stand instead, to be read again when it changes."""
    options: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """Keyword arguments for the constructors of transports, by scheme."""
    registry: RegistryChoice = "gossip"
    """How its members know of each other: a back end, or its name. All of a swarm have to agree."""
    find_neighbours: bool = False
    """Whether to look for the swarm's members on the local network, and to be found there; see
    `Transport.find_neighbours`. A server that knows no ``bootstrap`` joins through those it finds."""


@asynccontextmanager
async def listening(identity: Identity, network: NetworkConfig) -> AsyncIterator[tuple[Node, Registry]]:
    """A listening node, and its registry, which is yet to be started; both are closed at the end."""
    if not network.transports:
        raise InputError("a server needs at least one transport")
    node, registry = await _start_listening(identity, network)
    following: asyncio.Task[None] | None = None
    try:
        if network.allow_file is not None:
            following = asyncio.create_task(network.allow_file.follow(node, registry), name="list of peers")
        if network.find_neighbours:
            await meet_neighbours(node, registry, patience=0.0 if network.bootstrap else PATIENCE)
        yield node, registry
    finally:
        if following is not None:
            following.cancel()
        await registry.close()
        await node.close()


async def _join(node: Node, registry: Registry, network: NetworkConfig) -> None:
    """Start the registry; where there is no network yet, as on a machine that just started, wait for it."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + NETWORK_PATIENCE
    elsewhere = not all(Address.parse(url).on_loopback for url in network.bootstrap)
    while True:
        known = node.addresses
        try:
            return await registry.start()
        except PeerUnreachableError as exc:
            off = all(address.on_loopback for address in known)
            if not elsewhere or not off or loop.time() >= give_up:
                raise
            logger.warning("this machine has no network yet; joining once it has: %s", exc.message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NETWORK_PAUSE):
                await node.addresses_other_than(known)


async def _start_listening(identity: Identity, network: NetworkConfig) -> tuple[Node, Registry]:
    """A node that listens where ``network`` says, on the first of the ports by default that is free."""
    bootstrap = [Address.parse(url) for url in network.bootstrap]
    some_port = any(PORT in place for places in network.transports.values() for place in places)
    for port in (*range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED), 0):
        transports = []
        for number, (scheme, places) in enumerate(network.transports.items()):
            own_port = str(port + number if port else 0)
            transports.append(
                transport_class(scheme)(
                    identity,
                    listen_on=[place.replace(PORT, own_port) for place in places],
                    announce=[url for url in network.announce if url.startswith(f"{scheme}:")],
                    **network.options.get(scheme, {}),
                )
            )
        allowed = network.allow_file.peers if network.allow_file is not None else network.allowed_peers
        node = Node(identity, transports, allowed_peers=allowed)
        registry = make_registry(network.registry, node, bootstrap, member=True)
        try:
            await node.start()
        except AddressInUseError:
            await registry.close()
            if not (some_port and port):
                raise
        except BaseException:
            await registry.close()
            raise
        else:
            return node, registry
    raise AssertionError("port 0 is any free one")


async def run_server(
    config: ServerConfig,
    network: NetworkConfig,
    identity: Identity,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[CapacityPlan], None] | None = None,
    on_online: Callable[[BlockServer], None] | None = None,
    on_addresses: Callable[[tuple[str, ...]], None] | None = None,
    on_leaving: Callable[[BlockServer], None] | None = None,
) -> None:
    """Load the blocks, serve them until cancelled, then leave the swarm in good order.

    Which blocks: those of the settings, or as many as fit, of those that the swarm serves worst. When
    cancelled it lets its sessions move elsewhere for up to ``config.drain`` seconds; cancelled again it ends
    at once. Raise before joining when the addresses, the model, the blocks or the adapters are
    wrong.
    """
    rng = random.Random()
    async with AsyncExitStack() as stack:
        node, registry = await stack.enter_async_context(listening(identity, network))
        loader = await asyncio.to_thread(open_model, config, progress)
        model = attrs.evolve(loader.model, source=announced_source(config.model, config.revision))
        if config.span is not None:
            check_span(config.span, model.blocks, model.name)
        # Before the memory that is left for blocks is looked at.
        head = await stack.enter_async_context(_head(config, node, registry, progress))
        plan = await asyncio.to_thread(plan_blocks, config, loader)
        if on_plan is not None:
            on_plan(plan)
        kept = await asyncio.to_thread(speed_file, config, loader)
        await _join(node, registry, network)
        span = config.span or join_span(registry.view(), model, plan.blocks, rng, peer=node.peer)
        for folder in config.adapters.values():  # better refused now than once the blocks are loaded
            await _read_adapter(loader, folder, span)
        speed = _known_speed(config, kept)
        joining = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            state="joining",
            model=model,
            span=span,
            decode_rps=speed.compute.decode_rps / len(span),
            forward_rps=speed.compute.forward_rps / len(span),
            throughput=speed.throughput(len(span)),
            pinned=config.rebalance_interval == 0,
            incarnation=time.time_ns() // 1_000_000,
            public_name=config.public_name,
            version=version(),
        )
        await registry.announce(joining, config.announce_ttl)
        following = asyncio.create_task(follow_addresses(node, registry, joining, config.announce_ttl))
        try:
            began = asyncio.get_running_loop().time()
            executor = await asyncio.to_thread(loader.load, span, progress=progress)
            loading = asyncio.get_running_loop().time() - began
            speed = await _measure(speed, kept, executor, node, registry, rng)
        except BaseException:
            await registry.withdraw()
            raise
        finally:
            following.cancel()
        cache_tokens = config.cache_tokens or default_cache_tokens(executor, loader)
        settings = config
        if settings.activation_budget is None:
            settings = attrs.evolve(config, activation_budget=default_activation_budget(loader))
        async with BlockServer(
            settings,
            node,
            registry,
            executor,
            cache_tokens=cache_tokens,
            speed=speed,
            seconds_per_block=loading / len(span),
            read_adapter=partial(_read_adapter, loader),
            rng=rng,
            incarnation=joining.incarnation,
            head=head,
        ) as server:
            stack.enter_context(watching(node.hold_ups, places=True))
            if on_online is not None:
                on_online(server)
            try:
                await _report_addresses(node, on_addresses)
            except asyncio.CancelledError:
                if on_leaving is not None:
                    on_leaving(server)
                await server.leave()
                raise


@asynccontextmanager
async def _head(
    config: ServerConfig, node: Node, registry: Registry, progress: Progress | None
) -> AsyncIterator[HeadService | None]:
    if config.head is None:
        yield None
        return
    head = HeadConfig(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        threads=config.threads,
        limits=config.head,
    )
    async with serving_head(head, node, registry, progress=progress) as service:
        yield service


async def _read_adapter(loader: BlockLoader, folder: str, span: Span) -> Weights:
    return await asyncio.to_thread(read_adapter, folder, loader.config, span)


def _known_speed(config: ServerConfig, kept: SpeedFile) -> ServerSpeed:
    """What the user states, or what was measured at an earlier start."""
    if not isinstance(config.throughput, str):
        return ServerSpeed(stated=config.throughput)
    compute = kept.read() if config.throughput == "auto" else None
    return ServerSpeed(compute) if compute is not None else ServerSpeed()


async def _measure(
    known: ServerSpeed,
    kept: SpeedFile,
    executor: BlockExecutor,
    node: Node,
    registry: Registry,
    rng: random.Random,
) -> ServerSpeed:
    """Measure what is not known; the network is not kept, as it may be another one at the next start.

    Where the speed is stated, only the number of compute threads is found out.
    """
    compute = known.compute
    if known.stated:
        if not executor.thread_choices:
            return known
        compute = kept.read() or compute
    if not compute.forward_rps:
        compute = await measure_compute(executor)
        if compute.decode_rps and compute.forward_rps:
            kept.write(compute)
    elif compute.decode_threads:
        executor.use_threads(compute.decode_threads, compute.forward_threads)
    if known.stated:
        return known
    token_bytes = executor.model.hidden_size * ITEM_BYTES[executor.dtype]
    network_rps = await measure_network(node, list(registry.view()), token_bytes, rng)
    return ServerSpeed(compute, network_rps)


async def run_bootstrap(
    network: NetworkConfig,
    identity: Identity,
    *,
    public_name: str = "",
    head: HeadConfig | None = None,
    progress: Progress | None = None,
    on_online: Callable[[ServerInfo], None] | None = None,
    on_addresses: Callable[[tuple[str, ...]], None] | None = None,
) -> None:
    """Be a member of the swarm without blocks, for others to join through, until cancelled.

    With ``head`` it also makes texts of a model, whose blocks others hold, for clients without a part of it.
    """
    async with AsyncExitStack() as stack:
        node, registry = await stack.enter_async_context(listening(identity, network))
        await _join(node, registry, network)
        service = None
        if head is not None:
            service = await stack.enter_async_context(serving_head(head, node, registry, progress=progress))
        started_at = asyncio.get_running_loop().time()
        info = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            heads=(service.announced,) if service is not None else (),
            public_name=public_name,
            version=version(),
        )

        async def ping(request: Ping, caller: Caller) -> Pong:
            return Pong(request.payload)

        async def describe(request: InfoRequest, caller: Caller) -> InfoReply:
            current = attrs.evolve(info, addresses=tuple(map(str, node.addresses)))
            counters = service.counters if service is not None else {}
            uptime = asyncio.get_running_loop().time() - started_at
            counted = {name: float(count) for name, count in counters.items()} | node.measures
            notes = (*registry.notes, *node.notes)
            return InfoReply(current, uptime, counted, notes, node.resources.snapshot())

        node.serve(PING_METHOD, ping)
        node.serve(INFO_METHOD, describe)
        await registry.announce(info, BOOTSTRAP_TTL)
        if on_online is not None:
            on_online(info)
        following = asyncio.create_task(follow_addresses(node, registry, info, BOOTSTRAP_TTL))
        stack.enter_context(watching(node.hold_ups, places=True))
        try:
            await _report_addresses(node, on_addresses)
        finally:
            following.cancel()
            await registry.withdraw()


async def _report_addresses(node: Node, on_addresses: Callable[[tuple[str, ...]], None] | None) -> None:
    """Call ``on_addresses`` whenever the node is reached elsewhere; never ends."""
    known = node.addresses
    while True:
        known = await node.addresses_other_than(known)
        if on_addresses is not None:
            on_addresses(tuple(map(str, known)))
