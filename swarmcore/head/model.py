"""The model that a generation server uses: a client's, over this peer's own node and registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs

from swarmcore.head.queue import GenerationLimits
from swarmcore.head.service import GenerationService
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.sources import announced_source
from swarmcore.wire.protocols import GENERATE_PROTOCOL

if TYPE_CHECKING:
    from swarmcore.types import Progress


@attrs.frozen(kw_only=True)
class GenerationServerConfig:
    """Which model a generation server makes texts of, and how many."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    dtype: str = "auto"
    executor: str = "auto"
    """What computes the output layer, as in `Swarm.load_model`."""
    """Of embeddings and head."""
    threads: int | None = None
    limits: GenerationLimits = attrs.field(factory=GenerationLimits)


@asynccontextmanager
async def serving_generations(
    config: GenerationServerConfig, node: Node, registry: Registry, *, progress: Progress | None = None
) -> AsyncIterator[GenerationService]:
    """Make texts for others over ``node`` while the context lasts; at its end they are sent elsewhere.

    The sessions are those of a client on the same node, which knows the swarm by ``registry``; both are left
    open. Raises as `Swarm.load_model` does, and `UnsupportedModelError` for a model whose generation config
    asks for what cannot be done here.
    """
    # Most servers make no texts, and are online sooner without all of a client.
    from swarmcore.client.generation.generation_config import check_generation_config
    from swarmcore.client.swarm import Swarm

    async with Swarm(node, registry, owned=False) as swarm:
        model = await swarm.load_model(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            executor=config.executor,
            threads=config.threads,
            progress=progress,
        )
        check_generation_config(model.generation_config, config.model)
        service = GenerationService(
            model, config.limits, source=announced_source(config.model, config.revision)
        )
        node.serve_protocol(GENERATE_PROTOCOL, service.serve)
        try:
            yield service
        finally:
            await service.close()
