"""``swarmcore chat``: a conversation on the terminal."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

import click
from click.exceptions import Exit

from swarmcore.cli import interrupt
from swarmcore.cli.options import (
    RemoteModelOptions,
    one_line,
    remote_model_options,
    sampling_options,
    standard,
)
from swarmcore.cli.output import Output
from swarmcore.cli.remote import remote_model, show_route
from swarmcore.cli.thin import thin_here, thin_swarm
from swarmcore.cli.turns import turns
from swarmcore.errors import SwarmError
from swarmcore.generation_settings import GenerationSettings

if TYPE_CHECKING:
    from swarmcore.client.generation.chat import Chat

_COMMANDS = """\
/new   begin a new conversation
/bye   leave, as Ctrl-D does
What begins with another character, a blank for instance, is said to the model."""


@click.command()
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--thin", is_flag=True, help="Let a generation server make the answers; that needs no torch here."
)
@remote_model_options
@sampling_options
@standard
def chat(
    output: Output, system: str | None, thin: bool, remote: RemoteModelOptions, sampling: dict[str, Any]
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves.

    Where stdin is no terminal each of its lines is a turn, and the command fails if one of them does.
    """
    GenerationSettings.of(sampling)  # what cannot work is said before anything is loaded
    converse = _converse_thin if thin_here(output, thin) else _converse
    interrupt.run(converse(output, system, remote, sampling))


async def _converse(
    output: Output, system: str | None, remote: RemoteModelOptions, sampling: dict[str, Any]
) -> None:
    async with remote_model(output, remote) as (swarm, model):
        chain = swarm.chain(model.info)
        output.remark(f"{model.info.name} over {chain}. Ctrl-C stops an answer, Ctrl-D leaves.")
        output.event("ready", model=model.info.name, chain=str(chain))
        if remote.route:
            show_route(output, swarm, model.info, chain)
        async with model.chat(system=system) as conversation:
            await _turns(output, conversation, sampling, "chain")


async def _converse_thin(
    output: Output, system: str | None, remote: RemoteModelOptions, sampling: dict[str, Any]
) -> None:
    async with thin_swarm(remote) as swarm:
        model = swarm.generation_model(remote.model or "").name
        output.remark(f"Generation servers answer, with {model}. Ctrl-C stops an answer, Ctrl-D leaves.")
        output.event("ready", model=model, chain="")
        async with swarm.chat(system=system, model=remote.model or "") as conversation:
            await _turns(output, conversation, sampling, "server")


async def _turns(
    output: Output, conversation: Chat[Any], sampling: dict[str, Any], maker: Literal["chain", "server"]
) -> None:
    """``maker`` is what an answer names as where it was made."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    beginning = list(conversation.messages)
    failed = False
    async with aclosing(turns()) as said:
        async for text in said:
            if not typed or not text.startswith("/"):
                failed |= not await _turn(output, conversation, text, sampling, maker)
            elif text.strip() == "/new":
                conversation.messages[:] = beginning
                output.remark("a new conversation")
            elif text.strip() in ("/bye", "/exit", "/quit"):
                return
            else:
                output.remark(_COMMANDS)
    if failed and not typed:
        raise Exit(1)


async def _turn(
    output: Output, conversation: Chat[Any], text: str, sampling: dict[str, Any], maker: str
) -> bool:
    """Show the answer; an error of the swarm ends this turn only. Return whether there was none."""
    answer: list[str] = []

    async def show() -> None:
        async with aclosing(conversation.say(text, **sampling)) as pieces:
            async for piece in pieces:
                answer.append(piece)
                output.piece(piece)

    try:
        whole = await interrupt.finished(show())
    except SwarmError as exc:
        if answer:
            output.result("")
        output.remark(f"error: {one_line(exc)}")
        output.event("error", error=exc.wire_tag, message=str(exc), details=exc.details)
        return False
    output.result("" if whole else " …")
    made = conversation.generation
    output.event(
        "answer",
        text="".join(answer),
        finish_reason=made.finish_reason if made and whole else "interrupted",
        prompt_tokens=made.prompt_tokens if made else 0,
        new_tokens=made.new_tokens if made else 0,
        **{"head" if maker == "server" else maker: str(getattr(made, maker) or "") if made else ""},
    )
    return True
