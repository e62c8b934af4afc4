"""``swarmcore chat``: a conversation on the terminal."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click
from click.exceptions import Exit

from swarmcore.cli import interrupt
from swarmcore.cli.command import one_line, standard
from swarmcore.cli.option_kinds import option
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
from swarmcore.errors import SwarmError
from swarmcore.generation_settings import GenerationSettings

if TYPE_CHECKING:
    from swarmcore.client.generation.chat import Chat

_PROMPT = "> "
_LONGEST_LINE = 2**20
_COMMANDS = """\
/new   begin a new conversation
/bye   leave, as Ctrl-D does
What begins with another character, a blank for instance, is said to the model."""


@click.command()
@option("--system", metavar="TEXT", help="System message.")
@remote_model_options
@sampling_options
@standard
def chat(output: Output, system: str | None, remote: RemoteModelOptions, sampling: dict[str, Any]) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves.

    Where stdin is no terminal each of its lines is a turn, and the command fails if one of them does.
    """
    GenerationSettings.of(sampling)  # what cannot work is said before anything is loaded
    converse = _converse_thin if is_thin(output, remote) else _converse
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
            await _converse_over(output, conversation, sampling | remote.drafting, "chain", remote.route)


async def _converse_thin(
    output: Output, system: str | None, remote: RemoteModelOptions, sampling: dict[str, Any]
) -> None:
    async with model_swarm(remote) as swarm:
        model = swarm.generation_model(remote.model or "").name
        output.remark(f"Generation servers answer, with {model}. Ctrl-C stops an answer, Ctrl-D leaves.")
        output.event("ready", model=model, chain="")
        async with swarm.chat(system=system, model=remote.model or "") as conversation:
            await _converse_over(output, conversation, sampling, "server")


async def _converse_over(
    output: Output,
    conversation: Chat[Any],
    sampling: dict[str, Any],
    maker: Literal["chain", "server"],
    route: bool = False,
) -> None:
    """``maker`` is what an answer names as where it was made; with ``route`` also what drafts brought it."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    beginning = list(conversation.messages)
    failed = False
    async with aclosing(_lines()) as lines:
        async for text in lines:
            if not typed or not text.startswith("/"):
                failed |= not await _answer(output, conversation, text, sampling, maker, route)
            elif text.strip() == "/new":
                conversation.messages[:] = beginning
                output.remark("a new conversation")
            elif text.strip() in ("/bye", "/exit", "/quit"):
                return
            else:
                output.remark(_COMMANDS)
    if failed and not typed:
        raise Exit(1)


async def _answer(
    output: Output, conversation: Chat[Any], text: str, sampling: dict[str, Any], maker: str, route: bool
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
    if made is not None:
        show_numerics(output, made)
        if route:
            output.remark(str(made.speculation))
    output.event(
        "answer",
        text="".join(answer),
        finish_reason=made.finish_reason if made and whole else "interrupted",
        prompt_tokens=made.prompt_tokens if made else 0,
        new_tokens=made.new_tokens if made else 0,
        numerics=[str(way) for way in made.numerics] if made else [],
        **{"head" if maker == "server" else maker: str(getattr(made, maker) or "") if made else ""},
        **(speculation_values(made.speculation) if made and maker == "chain" else {}),
    )
    return True


def _lines() -> AsyncGenerator[str, None]:
    """Each line that is not blank, until Ctrl-D, Ctrl-C at an empty prompt, or the end of the file."""
    if sys.stdin is None:
        return _from_file(io.BytesIO())
    if sys.stdin.isatty():
        return _from_terminal()
    mode = os.fstat(sys.stdin.fileno()).st_mode
    # No event loop waits for what else there is, files and /dev/null among it.
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return _from_pipe() if waits else _from_file(sys.stdin.buffer)


async def _from_terminal() -> AsyncGenerator[str, None]:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(_PROMPT)
    while True:
        try:
            # The prompt would take the signal handler away for good; at the prompt Ctrl-C is a key anyway.
            line = await session.prompt_async(handle_sigint=False)
        except EOFError:
            return
        except KeyboardInterrupt:
            if session.default_buffer.text:
                continue
            return
        if line.strip():
            yield line


async def _from_file(file: BinaryIO) -> AsyncGenerator[str, None]:
    while line := file.readline(_LONGEST_LINE).decode(errors="replace"):
        if line.strip():
            yield line.strip()


async def _from_pipe() -> AsyncGenerator[str, None]:
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    try:
        while line := (await reader.readline()).decode(errors="replace"):
            if line.strip():
                yield line.strip()
    finally:
        transport.close()
