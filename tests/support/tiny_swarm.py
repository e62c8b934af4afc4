"""Swarms of tiny models in this process: real servers on the loopback interface, and models over them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tiny_models import save_random_model, tiny_config

from swarmcore import sync
from swarmcore.head.queue import GenerationLimits
from swarmcore.identity import Identity
from swarmcore.loop_thread import background_loop
from swarmcore.peer import NetworkConfig
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.serving import run_server
from swarmcore.transformers import AutoModelForCausalLM
from swarmcore.types import Span


@contextmanager
def served(
    folder: Path,
    *spans: str,
    dtype: str = "float32",
    adapters: Mapping[str, str] | None = None,
    heads: Sequence[GenerationLimits | None] = (),
    transport: str = "tcp",
    cache_tokens: int = 4096,
) -> Iterator[list[BlockServer]]:
    """Servers of these blocks of a model, on the background loop; the first is the bootstrap.

    The first of them are generation servers within the limits of ``heads``. ``transport`` is what they meet
    over.
    """
    loop = background_loop()
    servers: list[BlockServer] = []

    async def start(span: str, head: GenerationLimits | None) -> asyncio.Task[None]:
        online: asyncio.Future[BlockServer] = asyncio.get_running_loop().create_future()
        config = ServerConfig(
            model=str(folder),
            span=Span.parse(span),
            dtype=dtype,
            cache_tokens=cache_tokens,
            throughput=1000.0,
            drain=0.0,
            threads=1,
            adapters=adapters or {},
        )
        bootstrap = [str(server.node.addresses[0]) for server in servers[:1]]
        network = NetworkConfig(transports={transport: ["127.0.0.1:0"]}, bootstrap=bootstrap)
        running = run_server(config, network, Identity.generate(), head=head, on_online=online.set_result)
        task = asyncio.create_task(running)
        await asyncio.wait([task, online], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        servers.append(online.result())
        return task

    async def stop(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])

    with ExitStack() as stack:
        for span, head in zip_longest(spans, heads):
            task = loop.run(start(span, head))
            stack.callback(lambda task: loop.run(stop(task)), task)
        yield servers


class Tiny:
    """A tiny model, plain and over a swarm."""

    def __init__(self, plain: Any, remote: Any, swarm: sync.Swarm, servers: list[BlockServer]) -> None:
        self.plain, self.remote, self.swarm, self.servers = plain, remote, swarm, servers

    @property
    def folder(self) -> Path:
        return Path(self.servers[0].config.model)

    @property
    def address(self) -> str:
        return str(self.servers[0].node.addresses[0])

    @property
    def sessions(self) -> int:
        """Sessions that are open on all servers."""
        return sum(server.inference.sessions for server in self.servers)

    def sessions_end(self) -> bool:
        """Wait until servers have noticed that all sessions are closed; False when they do not."""
        gc.collect()  # exceptions that were caught somewhere may hold a test's caches in cycles
        return bool(background_loop().run(self._sessions_end()))

    async def _sessions_end(self) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 10
        while self.sessions and loop.time() < deadline:
            await asyncio.sleep(0.01)
        return not self.sessions


@contextmanager
def tiny_swarm(folder: Path, family: str, *spans: str) -> Iterator[Tiny]:
    plain = save_random_model(tiny_config(family), folder).eval()
    with served(folder, *spans) as servers, sync.connect(str(servers[0].node.addresses[0])) as swarm:
        remote = AutoModelForCausalLM.from_pretrained(folder, swarm=swarm, dtype="float32")
        swarm.wait_for_blocks(remote.stack.model, timeout=30)
        with remote:
            yield Tiny(plain, remote, swarm, servers)
