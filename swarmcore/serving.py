"""Starts servers: from settings to a running block server or bootstrap peer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs

from swarmcore.distribution import version
from swarmcore.head.model import GenerationServerConfig, serving_generations
from swarmcore.head.queue import GenerationLimits
from swarmcore.head.service import GenerationService
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig, join, listening
from swarmcore.placement.choice import join_span
from swarmcore.registry.base import Registry
from swarmcore.registry.lan import follow_addresses
from swarmcore.resources.loop_stalls import watch_loop
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import answer_ping
from swarmcore.server.adapters import Weights
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.loading import (
    check_span,
    default_cache_tokens,
    memory_left,
    open_model,
    plan_blocks,
    read_adapter,
    speed_file,
)
from swarmcore.server.throughput import ServerSpeed, SpeedFile, measure_compute, measure_network
from swarmcore.sources import announced_source
from swarmcore.tasks import running
from swarmcore.types import ServerInfo, Span
from swarmcore.wire.messages import InfoReply, InfoRequest
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import INFO_METHOD, PING_METHOD
from swarmcore.wire.tensors import ITEM_BYTES

if TYPE_CHECKING:
    from swarmcore.executor.base import BlockExecutor
    from swarmcore.executor.loader import BlockLoader
    from swarmcore.placement.capacity import CapacityPlan
    from swarmcore.types import Progress

BOOTSTRAP_TTL = 300.0
"""Seconds for which a bootstrap peer's announcement is believed that is not renewed."""


async def run_server(
    config: ServerConfig,
    network: NetworkConfig,
    identity: Identity,
    *,
    head: GenerationLimits | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[CapacityPlan], None] | None = None,
    on_online: Callable[[BlockServer], None] | None = None,
    on_addresses: Callable[[tuple[str, ...]], None] | None = None,
    on_leaving: Callable[[BlockServer], None] | None = None,
) -> None:
    """Load the blocks, serve them until cancelled, then leave the swarm in good order.

    Which blocks: those of the settings, or as many as fit, of those that the swarm serves worst. With
    ``head`` it also makes texts, within these limits, for clients that have no part of the model. When
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
        service = await stack.enter_async_context(_head(head, config, node, registry, progress))
        plan = await asyncio.to_thread(plan_blocks, config, loader)
        if on_plan is not None:
            on_plan(plan)
        speed_cache = await asyncio.to_thread(speed_file, loader)
        await join(node, registry, network)
        span = config.span or join_span(
            registry.view(), model, plan.blocks, rng, peer=node.peer, start_step=loader.start_step
        )
        for folder in config.adapters.values():  # better refused now than once the blocks are loaded
            await _read_adapter(loader, folder, span)
        speed = _known_speed(config, speed_cache)
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
            start_step=loader.start_step,
            incarnation=time.time_ns() // 1_000_000,
            public_name=config.public_name,
            version=version(),
        )
        await registry.announce(joining, config.announce_ttl)
        following = follow_addresses(node, registry, joining, config.announce_ttl)
        try:
            async with running(following, "addresses of a server that joins"):
                began = asyncio.get_running_loop().time()
                executor = await asyncio.to_thread(loader.load, span, progress=progress)
                loading = asyncio.get_running_loop().time() - began
                speed = await _measure(speed, speed_cache, executor, node, registry, rng)
        except BaseException:
            await registry.withdraw()
            raise
        memory = memory_left(plan, executor, loader)
        cache_tokens = config.cache_tokens or default_cache_tokens(executor, memory)
        settings = config
        if settings.activation_budget is None:
            settings = attrs.evolve(config, activation_budget=memory // 5)
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
            service=service,
            start_step=loader.start_step,
        ) as server:
            stack.enter_context(watch_loop(node.loop_stalls, places=True))
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
    limits: GenerationLimits | None,
    config: ServerConfig,
    node: Node,
    registry: Registry,
    progress: Progress | None,
) -> AsyncIterator[GenerationService | None]:
    if limits is None:
        yield None
        return
    head = GenerationServerConfig(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        executor="torch" if config.executor == "torch" else "auto",
        threads=config.threads,
        limits=limits,
    )
    async with serving_generations(head, node, registry, progress=progress) as service:
        yield service


async def _read_adapter(loader: BlockLoader, folder: str, span: Span) -> Weights:
    return await asyncio.to_thread(read_adapter, folder, loader.config, span)


def _known_speed(config: ServerConfig, speed_cache: SpeedFile) -> ServerSpeed:
    """What the user states, or what was measured at an earlier start."""
    if not isinstance(config.throughput, str):
        return ServerSpeed(stated=config.throughput)
    compute = speed_cache.read() if config.throughput == "auto" else None
    return ServerSpeed(compute) if compute is not None else ServerSpeed()


async def _measure(
    known: ServerSpeed,
    speed_cache: SpeedFile,
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
        compute = speed_cache.read() or compute
    if not compute.forward_rps:
        compute = await measure_compute(executor)
        if compute.decode_rps and compute.forward_rps:
            speed_cache.write(compute)
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
    head: GenerationServerConfig | None = None,
    progress: Progress | None = None,
    on_online: Callable[[ServerInfo], None] | None = None,
    on_addresses: Callable[[tuple[str, ...]], None] | None = None,
) -> None:
    """Be a member of the swarm without blocks, for others to join through, until cancelled.

    With ``head`` it also makes texts of a model, whose blocks others hold, for clients without a part of it.
    """
    async with AsyncExitStack() as stack:
        node, registry = await stack.enter_async_context(listening(identity, network))
        await join(node, registry, network)
        service = None
        if head is not None:
            service = await stack.enter_async_context(
                serving_generations(head, node, registry, progress=progress)
            )
        started_at = asyncio.get_running_loop().time()
        info = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            heads=(service.announced,) if service is not None else (),
            public_name=public_name,
            version=version(),
            capabilities=(),
        )

        async def describe(request: InfoRequest, caller: Caller) -> InfoReply:
            current = attrs.evolve(info, addresses=tuple(map(str, node.addresses)))
            counters = service.counters if service is not None else {}
            uptime = asyncio.get_running_loop().time() - started_at
            counted = {name: float(count) for name, count in counters.items()} | node.measures
            notes = (*registry.notes, *node.notes)
            return InfoReply(current, uptime, counted, notes, node.resources.snapshot())

        node.serve(PING_METHOD, answer_ping)
        node.serve(INFO_METHOD, describe)
        await registry.announce(info, BOOTSTRAP_TTL)
        if on_online is not None:
            on_online(info)
        stack.enter_context(watch_loop(node.loop_stalls, places=True))
        following = follow_addresses(node, registry, info, BOOTSTRAP_TTL)
        try:
            async with running(following, "addresses of a bootstrap peer"):
                await _report_addresses(node, on_addresses)
        finally:
            await registry.withdraw()


async def _report_addresses(node: Node, on_addresses: Callable[[tuple[str, ...]], None] | None) -> None:
    """Call ``on_addresses`` whenever the node is reached elsewhere; never ends."""
    known = node.addresses
    while True:
        known = await node.addresses_other_than(known)
        if on_addresses is not None:
            on_addresses(tuple(map(str, known)))
