"""``swarmcore generate`` and ``chat`` without torch: generation servers make the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from swarmcore.cli.options import RemoteModelOptions, load_identity
from swarmcore.cli.output import Output

if TYPE_CHECKING:
    from swarmcore.client.swarm import Swarm


def thin_here(output: Output, thin: bool) -> bool:
    """Whether generation servers make the text: when asked for, and where there is no torch to do
    otherwise."""
    if not thin and find_spec("torch") is None:
        output.remark("torch is not installed here: a generation server makes the text, as with --thin")
        return True
    return thin


def thin_swarm(remote: RemoteModelOptions) -> Swarm:
    """The swarm to enter, for one who has no part of a model."""
    from swarmcore.client.swarm import connect

    return connect(
        *remote.bootstrap,
        mdns=remote.mdns,
        registry=remote.registry,
        transport_options=remote.transport_options,
        identity=load_identity(remote.identity_file),
        allowed_servers=remote.allowed_servers or None,
        blocked_servers=remote.blocked_servers,
    )


async def generate_thin(
    output: Output,
    remote: RemoteModelOptions,
    prompt: str | Sequence[Mapping[str, str]],
    sampling: dict[str, Any],
) -> None:
    """Show the text that a generation server of the swarm makes."""
    async with (
        thin_swarm(remote) as swarm,
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
            head=generation.server,
        )
