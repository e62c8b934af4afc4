"""Starts servers: from settings to a running block server or bootstrap peer."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import attrs

from swarmcore.errors import InputError, SpanError
from swarmcore.identity import Identity
from swarmcore.registry.base import Registry
from swarmcore.registry.gossip import GossipRegistry
from swarmcore.rpc.method import Caller
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.protocols import INFO_METHOD, PING_METHOD
from swarmcore.transport import transport_class
from swarmcore.types import Address, PeerId, ServerInfo, Span
from swarmcore.wire.messages import InfoReply, InfoRequest, Ping, Pong

if TYPE_CHECKING:
    from swarmcore.executor.base import BlockExecutor
    from swarmcore.executor.torch.checkpoint import Checkpoint, Progress

logger = logging.getLogger(__name__)

BOOTSTRAP_TTL = 300.0
"""Seconds for which a bootstrap peer's announcement is believed that is not renewed."""

MAX_DEFAULT_CACHE_TOKENS = 131_072


@attrs.frozen(kw_only=True)
class NetworkConfig:
    """Where a server listens and whom it joins."""

    transports: Mapping[str, Sequence[str]]
    """Transport schemes, each with the places to listen on in that transport's notation."""
    announce: Sequence[str] = ()
    """Addresses to announce instead of those found, for a host behind a forwarded port."""
    bootstrap: Sequence[str] = ()
    """Addresses of members of the swarm; none for the first one."""
    allowed_peers: Collection[PeerId] | None = None
    """The only peers that may call this one; None for everyone."""


@asynccontextmanager
async def listening(identity: Identity, network: NetworkConfig) -> AsyncIterator[tuple[Node, Registry]]:
    """A listening node, and its registry, which is yet to be started; both are closed at the end."""
    if not network.transports:
        raise InputError("a server needs at least one transport")
    transports = []
    for scheme, listen_on in network.transports.items():
        announce = [url for url in network.announce if url.startswith(f"{scheme}:")]
        transports.append(transport_class(scheme)(identity, listen_on=listen_on, announce=announce))
    node = Node(identity, transports, allowed_peers=network.allowed_peers)
    registry = GossipRegistry(node, [Address.parse(url) for url in network.bootstrap])
    try:
        await node.start()
        yield node, registry
    finally:
        await registry.close()
        await node.close()


async def run_server(
    config: ServerConfig,
    network: NetworkConfig,
    identity: Identity,
    *,
    progress: Progress | None = None,
    on_online: Callable[[BlockServer], None] | None = None,
) -> None:
    """Load the blocks, serve them until cancelled, then leave the swarm in good order.

    Raise before joining when the addresses, the model or the blocks are wrong.
    """
    async with listening(identity, network) as (node, registry):
        checkpoint = await asyncio.to_thread(_open, config, progress)
        span = check_span(config.span, checkpoint.info.blocks, checkpoint.info.name)
        await registry.start()
        await registry.announce(
            ServerInfo(
                peer=node.peer,
                addresses=tuple(map(str, node.addresses)),
                state="joining",
                model=checkpoint.info,
                span=span,
                public_name=config.public_name,
                version=version("swarmcore"),
            ),
            config.announce_ttl,
        )
        try:
            executor = await asyncio.to_thread(_load, config, checkpoint, span, progress)
        except BaseException:
            await registry.withdraw()
            raise
        cache_tokens = config.cache_tokens or _default_cache_tokens(executor, config.device)
        async with BlockServer(config, node, registry, executor, cache_tokens=cache_tokens) as server:
            if on_online is not None:
                on_online(server)
            await asyncio.get_running_loop().create_future()


async def run_bootstrap(
    network: NetworkConfig,
    identity: Identity,
    *,
    public_name: str = "",
    on_online: Callable[[ServerInfo], None] | None = None,
) -> None:
    """Be a member of the swarm without blocks, for others to join through, until cancelled."""
    async with listening(identity, network) as (node, registry):
        await registry.start()
        started_at = asyncio.get_running_loop().time()
        info = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            public_name=public_name,
            version=version("swarmcore"),
        )

        async def ping(request: Ping, caller: Caller) -> Pong:
            return Pong(request.payload)

        async def describe(request: InfoRequest, caller: Caller) -> InfoReply:
            return InfoReply(info, asyncio.get_running_loop().time() - started_at)

        node.serve(PING_METHOD, ping)
        node.serve(INFO_METHOD, describe)
        await registry.announce(info, BOOTSTRAP_TTL)
        if on_online is not None:
            on_online(info)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await registry.withdraw()


def check_span(span: Span | None, blocks: int, name: str) -> Span:
    """The blocks to hold. Raise `SpanError` when the model does not have them."""
    span = span or Span(0, blocks)
    if span.end > blocks:
        raise SpanError(f"{name} has {blocks} blocks, 0:{blocks}; it has no blocks {span}")
    return span


def _open(config: ServerConfig, progress: Progress | None) -> Checkpoint:
    # torch is imported here at the earliest, after the caller has set the environment that it reads.
    from swarmcore.executor.torch.checkpoint import open_checkpoint

    return open_checkpoint(config.model, revision=config.revision, progress=progress)


def _load(
    config: ServerConfig, checkpoint: Checkpoint, span: Span, progress: Progress | None
) -> BlockExecutor:
    from swarmcore.executor.torch.executor import TorchExecutor

    return TorchExecutor.load(
        checkpoint,
        span,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        progress=progress,
    )


def _default_cache_tokens(executor: BlockExecutor, device: str) -> int:
    """A quarter of the memory that is free now that the weights are in it."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tokens = free // 4 // executor.cache_bytes_per_token
    return max(executor.page, min(tokens, MAX_DEFAULT_CACHE_TOKENS))
