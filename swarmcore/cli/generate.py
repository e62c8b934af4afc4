"""``swarmcore generate``: one prompt, one continuation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import standard
from swarmcore.cli.option_kinds import flag, option
from swarmcore.cli.options import RemoteModelOptions, remote_model_options, sampling_options
from swarmcore.cli.output import Output
from swarmcore.cli.remote import (
    is_thin,
    model_swarm,
    remote_model,
    show_numerics,
    show_route,
    speculation_values,
)
from swarmcore.errors import InputError
from swarmcore.generation_settings import GenerationSettings
from swarmcore.prompts import checked_prompt

if TYPE_CHECKING:
    from swarmcore.client.generation.stream import TextStream


@click.command()
@click.argument("prompt", nargs=-1)
@flag("--chat", "as_chat", help="Put PROMPT to the model as a chat message.")
@option("--system", metavar="TEXT", help="System message; implies --chat.")
@remote_model_options
@sampling_options
@standard
def generate(
    output: Output,
    prompt: tuple[str, ...],
    as_chat: bool,
    system: str | None,
    remote: RemoteModelOptions,
    sampling: dict[str, Any],
) -> None:
    """Continue PROMPT, or what stdin holds, and stream the text to stdout."""
    text = " ".join(prompt) if prompt else sys.stdin.read()
    if not text.strip():
        raise InputError("the prompt is empty; pass it as arguments or on stdin")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    asked = messages if as_chat or system is not None else text
    checked_prompt(asked)  # what cannot work is said before anything is loaded
    GenerationSettings.of(sampling)
    make = _generate_thin if is_thin(output, remote) else _generate
    interrupt.run(make(output, remote, asked, sampling))


async def _generate(
    output: Output, remote: RemoteModelOptions, prompt: str | list[dict[str, str]], sampling: dict[str, Any]
) -> None:
    async with (
        remote_model(output, remote) as (swarm, model),
        model.generate(prompt, **sampling, **remote.drafting) as generation,
    ):
        text = await _stream(output, generation)
        show_numerics(output, generation)
        if remote.route:
            show_route(output, swarm, model.info, generation.chain)
            output.remark(str(generation.speculation))
        _report(
            output,
            generation,
            text,
            chain=str(generation.chain),
            cached_tokens=generation.cached_tokens,
            **speculation_values(generation.speculation),
        )


async def _generate_thin(
    output: Output, remote: RemoteModelOptions, prompt: str | list[dict[str, str]], sampling: dict[str, Any]
) -> None:
    async with (
        model_swarm(remote) as swarm,
        swarm.generate(prompt, model=remote.model or "", patience=remote.patience, **sampling) as generation,
    ):
        text = await _stream(output, generation)
        show_numerics(output, generation)
        _report(output, generation, text, head=generation.server)


async def _stream(output: Output, generation: TextStream) -> str:
    """Show the text as it comes; return the whole of it."""
    pieces = []
    async for piece in generation:
        pieces.append(piece)
        output.piece(piece)
    output.result("")
    return "".join(pieces)


def _report(output: Output, generation: TextStream, text: str, **made_by: object) -> None:
    output.event(
        "generated",
        text=text,
        finish_reason=generation.finish_reason,
        prompt_tokens=generation.prompt_tokens,
        new_tokens=generation.new_tokens,
        numerics=[str(way) for way in generation.numerics],
        seconds=round(generation.seconds, 4),
        first_token_seconds=generation.first_token_seconds,
        **made_by,
    )
