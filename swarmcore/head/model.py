"""A head peer's part of the model: the ordinary client's, inside of a peer that runs for itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs

from swarmcore.client.generation.generation_config import check_generation_config
from swarmcore.client.swarm import Swarm
from swarmcore.head.queue import HeadLimits
from swarmcore.head.service import HeadService
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.sources import announced_source
from swarmcore.wire.protocols import GENERATE_PROTOCOL

if TYPE_CHECKING:
    from swarmcore.checkpoint import Progress


@attrs.frozen(kw_only=True)
class HeadConfig:
    """Which model a head peer makes texts of, and how many."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    dtype: str = "auto"
    """Of embeddings and head."""
    threads: int | None = None
    limits: HeadLimits = attrs.field(factory=HeadLimits)


@asynccontextmanager
async def serving_head(
    config: HeadConfig, node: Node, registry: Registry, *, progress: Progress | None = None
) -> AsyncIterator[HeadService]:
    """Make texts for others over ``node`` while the context lasts; at its end they are sent elsewhere.

    The sessions are those of a client on the same node, which knows the swarm by ``registry``; both are left
    open. Raises as `Swarm.load_model` does, and `UnsupportedModelError` for a model whose generation config
    asks for what cannot be done here.
    """
    async with Swarm(node, registry, owned=False) as swarm:
        model = await swarm.load_model(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            threads=config.threads,
            progress=progress,
        )
        check_generation_config(model.generation_config, config.model)
        service = HeadService(model, config.limits, source=announced_source(config.model, config.revision))
        node.serve_protocol(GENERATE_PROTOCOL, service.serve)
        try:
            yield service
        finally:
            await service.close()
