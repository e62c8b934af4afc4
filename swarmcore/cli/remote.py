"""From the options of a client to a model that the swarm runs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs

from swarmcore.cli.options import RemoteModelOptions, load_identity, set_thread_environment
from swarmcore.cli.output import Output, can_redraw

if TYPE_CHECKING:
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.client.session.options import Failover
    from swarmcore.client.swarm import Swarm
    from swarmcore.routing.chain import Chain
    from swarmcore.types import ModelInfo


@asynccontextmanager
async def remote_model(
    output: Output, options: RemoteModelOptions
) -> AsyncIterator[tuple[Swarm, RemoteModel]]:
    """Join the swarm, load the client's part of the model, and wait until servers cover all its blocks."""
    set_thread_environment(options.threads)

    from swarmcore.client.session.session import SessionOptions
    from swarmcore.client.swarm import connect

    async with connect(
        *options.bootstrap,
        mdns=options.mdns,
        registry=options.registry,
        transport_options=options.transport_options,
        identity=load_identity(options.identity_file),
        allowed_servers=options.allowed_servers or None,
        blocked_servers=options.blocked_servers,
        max_hops=options.max_hops,
    ) as swarm:
        with output.progress() as progress:
            model = await swarm.load_model(
                options.model,
                dtype=options.dtype,
                revision=options.revision,
                threads=options.threads,
                session_options=SessionOptions(
                    codec=options.codec,
                    journal=options.journal,
                    patience=options.patience,
                    on_failover=partial(_show_failover, output),
                ),
                progress=progress,
            )
        await swarm.wait_for_blocks(model.info, timeout=options.wait)
        yield swarm, model


def show_route(output: Output, swarm: Swarm, model: ModelInfo, chain: Chain) -> None:
    """Say which servers ``chain`` passes through, and where a token's time is expected to go."""
    cost = swarm.route(model, chain)
    output.remark(str(cost))
    output.event(
        "route",
        seconds=cost.seconds,
        way_back=cost.way_back,
        stages=[
            {
                "server": stage.stage.server.peer,
                "blocks": str(stage.stage.span),
                "network": stage.network,
                "queue": stage.queue,
                "compute": stage.compute,
            }
            for stage in cost.stages
        ],
    )


def _show_failover(output: Output, failover: Failover) -> None:
    # The text that is being streamed may have left the cursor in the middle of a line.
    output.remark(f"{chr(10) if can_redraw(sys.stdout) else ''}{failover}")
    output.event("failover", **attrs.asdict(failover))
