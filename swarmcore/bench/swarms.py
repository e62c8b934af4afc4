"""Swarms of server processes on this machine, for benchmarks to measure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from swarmcore.bench.link_pump import LEFT, RIGHT
from swarmcore.bench.long_link import LongLink
from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import InputError
from swarmcore.testing.fleet import Fleet
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess
from swarmcore.types import Span

CACHE_TOKENS = 16_384


@asynccontextmanager
async def start_swarm(
    checkpoint: Checkpoint,
    size: int,
    *,
    dtype: str,
    threads: int,
    model: str = "",
    executor: str = "auto",
    weights: str = "auto",
    network: LongLink | None = None,
) -> AsyncIterator[str]:
    """``size`` server processes with the blocks split evenly; yields the address of one of them.

    They open ``model``, by default what the ``checkpoint`` was made into, with ``executor`` and ``weights``
    as for ``swarmcore serve``; in a ``network`` each is at the other end of the link than the one before
    it, the first on the right. Raise `InputError` for more servers than there are blocks.
    """
    info = checkpoint.info
    if size > info.blocks:
        raise InputError(f"{size} servers cannot share the {info.blocks} blocks of {info.name}; use fewer")

    async def server(place: int, span: Span, *joining: str) -> ServerProcess:
        host = LEFT if place % 2 else RIGHT
        return await ServerProcess.start(
            "serve",
            *("--model", model or str(checkpoint.folder), "--blocks", str(span)),
            *serve_options(dtype, threads),
            *("--executor", executor, "--weights", weights),
            *("--listen", f"{network.address(host) if network else '127.0.0.1'}:0"),
            *joining,
            prefix=network.within(network.namespace(host)) if network else (),
        )

    async with AsyncExitStack() as stack:
        first, *rest = info.span.split(size)
        bootstrap = await stack.enter_async_context(await server(0, first))
        for place, span in enumerate(rest, 1):
            await stack.enter_async_context(await server(place, span, "--bootstrap", bootstrap.address))
        yield bootstrap.address


@asynccontextmanager
async def start_fleet(
    checkpoint: Checkpoint,
    stages: int,
    replicas: int,
    *,
    dtype: str,
    threads: int,
    cache_tokens: int = CACHE_TOKENS,
) -> AsyncIterator[Fleet]:
    """``replicas`` server processes for each of ``stages``, with the blocks split evenly."""
    async with (
        ForkServer(threads=threads) as fork_server,
        Fleet(
            fork_server,
            str(checkpoint.folder),
            checkpoint.info.span.split(stages),
            replicas=replicas,
            arguments=serve_options(dtype, threads, cache_tokens),
        ) as fleet,
    ):
        yield fleet


def serve_options(dtype: str, threads: int, cache_tokens: int = CACHE_TOKENS) -> tuple[str, ...]:
    """Arguments of ``swarmcore serve`` that all servers of benchmarks have."""
    return ("--dtype", dtype, "--threads", str(threads), "--cache-tokens", str(cache_tokens))
