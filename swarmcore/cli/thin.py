"""``swarmcore generate`` without torch: a head peer makes the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from swarmcore.cli.options import RemoteModelOptions, load_identity
from swarmcore.cli.output import Output


def torch_is_missing() -> bool:
    return find_spec("torch") is None


async def generate_thin(
    output: Output,
    remote: RemoteModelOptions,
    prompt: str | Sequence[Mapping[str, str]],
    sampling: dict[str, Any],
) -> None:
    """Show the text that a head peer of the swarm makes."""
    from swarmcore.client.swarm import connect

    async with (
        connect(
            *remote.bootstrap,
            mdns=remote.mdns,
            registry=remote.registry,
            transport_options=remote.transport_options,
            identity=load_identity(remote.identity_file),
            allowed_servers=remote.allowed_servers or None,
            blocked_servers=remote.blocked_servers,
        ) as swarm,
        swarm.generate(prompt, model=remote.model or "", patience=remote.patience, **sampling) as generation,
    ):
        pieces = []
        async for piece in generation:
            pieces.append(piece)
            output.piece(piece)
        output.result("")
        output.event(
            "generated",
            text="".join(pieces),
            finish_reason=generation.finish_reason,
            prompt_tokens=generation.prompt_tokens,
            new_tokens=generation.new_tokens,
            seconds=round(generation.seconds, 4),
            first_token_seconds=generation.first_token_seconds,
            head=generation.head,
        )
