"""``swarmcore generate``: one prompt, one continuation."""

from __future__ import annotations

import sys
from typing import Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.options import RemoteModelOptions, remote_model_options, sampling_options, standard
from swarmcore.cli.output import Output
from swarmcore.cli.remote import remote_model, show_route
from swarmcore.cli.thin import generate_thin, thin_here
from swarmcore.errors import InputError
from swarmcore.generation_settings import GenerationSettings
from swarmcore.prompts import checked_prompt


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--chat", "as_chat", is_flag=True, help="Put PROMPT to the model as a chat message.")
@click.option("--system", metavar="TEXT", help="System message; implies --chat.")
@click.option("--thin", is_flag=True, help="Let a generation server make the text; that needs no torch here.")
@remote_model_options
@sampling_options
@standard
def generate(
    output: Output,
    prompt: tuple[str, ...],
    as_chat: bool,
    system: str | None,
    thin: bool,
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
    make = generate_thin if thin_here(output, thin) else _generate
    interrupt.run(make(output, remote, asked, sampling))


async def _generate(
    output: Output, remote: RemoteModelOptions, prompt: str | list[dict[str, str]], sampling: dict[str, Any]
) -> None:
    async with (
        remote_model(output, remote) as (swarm, model),
        model.generate(prompt, **sampling) as generation,
    ):
        pieces = []
        async for piece in generation:
            pieces.append(piece)
            output.piece(piece)
        output.result("")
        if remote.route:
            show_route(output, swarm, model.info, generation.chain)
        output.event(
            "generated",
            text="".join(pieces),
            finish_reason=generation.finish_reason,
            prompt_tokens=generation.prompt_tokens,
            new_tokens=generation.new_tokens,
            seconds=round(generation.seconds, 4),
            first_token_seconds=generation.first_token_seconds,
            chain=str(generation.chain),
        )
