"""How a client joins a swarm, and the model that ``generate`` and ``chat`` talk with."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import attrs

from swarmcore.cli.command import set_thread_environment
from swarmcore.cli.options import ClientOptions, RemoteModelOptions
from swarmcore.cli.output import Output, can_redraw
from swarmcore.cli.webrtc import transport_options
from swarmcore.errors import InputError
from swarmcore.identity import Identity

if TYPE_CHECKING:
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.client.generation.stream import TextStream
    from swarmcore.client.session.options import Failover
    from swarmcore.client.speculation.counts import SpeculationCounts
    from swarmcore.client.swarm import Swarm
    from swarmcore.routing.chain import Chain
    from swarmcore.types import ModelInfo


def swarm_of(options: ClientOptions, **limits: Any) -> Swarm:
    """The swarm to enter; ``limits`` are arguments of `connect`."""
    from swarmcore.client.swarm import connect

    file = options.identity_file
    return connect(
        *options.bootstrap,
        mdns=options.mdns,
        registry=options.registry,
        identity=Identity.load_or_create(file) if file is not None else Identity.generate(),
        transport_options=transport_options(
            ice=options.ice,
            ice_file=options.ice_file,
            ice_relay_only=options.ice_relay_only,
            signalling_ca=options.signalling_ca,
            webrtc_engine=options.webrtc_engine,
        ),
        **limits,
    )


def is_thin(output: Output, options: RemoteModelOptions) -> bool:
    """Whether generation servers make the text: when asked for, and where there is no torch to do
    otherwise."""
    thin = options.thin
    if not thin and find_spec("torch") is None:
        output.remark("torch is not installed here: a generation server makes the text, as with --thin")
        thin = True
    if thin and (options.draft is not None or options.speculation != "auto"):
        raise InputError(
            "a generation server decides itself what it drafts: leave out --draft and --speculation"
        )
    return thin


def model_swarm(options: RemoteModelOptions) -> Swarm:
    """The swarm to enter for a model, with the servers that may be used of it."""
    return swarm_of(
        options,
        allowed_servers=options.allowed_servers or None,
        blocked_servers=options.blocked_servers,
        max_hops=options.max_hops,
    )


@asynccontextmanager
async def remote_model(
    output: Output, options: RemoteModelOptions
) -> AsyncIterator[tuple[Swarm, RemoteModel]]:
    """Join the swarm, load the client's part of the model, and wait until servers cover all its blocks."""
    set_thread_environment(options.threads)

    from swarmcore.client.session.session import SessionOptions

    async with model_swarm(options) as swarm:
        with output.progress() as progress:
            model = await swarm.load_model(
                options.model,
                dtype=options.dtype,
                revision=options.revision,
                threads=options.threads,
                executor=options.executor,
                session_options=SessionOptions(
                    codec=options.codec,
                    journal=options.journal,
                    prefix_cache=not options.no_prefix_cache,
                    patience=options.patience,
                    on_failover=partial(_show_failover, output),
                ),
                draft=options.draft,
                progress=progress,
            )
        await swarm.wait_for_blocks(model.info, timeout=options.wait)
        yield swarm, model


def show_numerics(output: Output, generation: TextStream) -> None:
    """Say so where a text was made in several ways."""
    if len(generation.numerics) > 1:
        ways = ", ".join(map(str, generation.numerics))
        output.remark(f"made by servers that compute in several ways, {ways}: one alone may say it otherwise")


def show_route(output: Output, swarm: Swarm, model: ModelInfo, chain: Chain) -> None:
    """Say which servers ``chain`` passes through, and where a token's time is expected to go."""
    cost = swarm.route(model, chain)
    output.remark(str(cost))
    output.event(
        "route",
        seconds=cost.seconds,
        way_back=cost.return_seconds,
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


def speculation_values(counts: SpeculationCounts) -> dict[str, Any]:
    """What drafts have brought, for programs."""
    return {
        "tokens_per_step": round(counts.tokens_per_step, 2),
        "drafted": counts.drafted.total(),
        "accepted": counts.accepted.total(),
        "drafters": {
            name: {"drafted": drafted, "accepted": counts.accepted[name]}
            for name, drafted in counts.drafted.items()
        },
        "drafters_set_aside": counts.set_aside,
    }


def _show_failover(output: Output, failover: Failover) -> None:
    # The text that is being streamed may have left the cursor in the middle of a line.
    output.remark(f"{chr(10) if can_redraw(sys.stdout) else ''}{failover}")
    output.event("failover", **attrs.asdict(failover))
