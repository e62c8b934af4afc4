"""``swarmcore chat``: a conversation on the terminal."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.options import remote_model_options, sampling_options, standard
from swarmcore.cli.output import Output
from swarmcore.cli.remote import RemoteModelOptions, given, remote_model
from swarmcore.cli.turns import turns
from swarmcore.errors import SwarmError

if TYPE_CHECKING:
    from swarmcore.client.model import RemoteModel


@click.command()
@click.option("--system", metavar="TEXT", help="System message.")
@remote_model_options
@sampling_options
@standard
def chat(
    output: Output,
    system: str | None,
    bootstrap: tuple[str, ...],
    identity_file: str | None,
    model: str | None,
    revision: str | None,
    dtype: str,
    threads: int | None,
    wait: float,
    **sampling: Any,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves.

    Where stdin is no terminal each of its lines is a turn.
    """
    options = RemoteModelOptions(
        bootstrap=bootstrap,
        identity_file=identity_file,
        model=model,
        revision=revision,
        dtype=dtype,
        threads=threads,
        wait=wait,
    )
    interrupt.run(_chat(output, options, system, given(sampling)))


async def _chat(
    output: Output, options: RemoteModelOptions, system: str | None, sampling: dict[str, Any]
) -> None:
    async with remote_model(output, options) as (swarm, model), aclosing(turns()) as said:
        output.remark(
            f"{model.info.name} over {swarm.chain(model.info)}. Ctrl-C stops an answer, Ctrl-D leaves."
        )
        output.event("ready", model=model.info.name, chain=str(swarm.chain(model.info)))
        messages = [{"role": "system", "content": system}] if system is not None else []
        async for line in said:
            messages.append({"role": "user", "content": line})
            answer: list[str] = []
            try:
                whole = await interrupt.finished(_answer(output, model, messages, sampling, answer))
            except SwarmError as exc:
                # The conversation can go on when another server has taken over.
                output.remark(f"error: {exc}")
                output.event("error", error=type(exc).__name__, message=str(exc), details=exc.details)
                messages.pop()
                continue
            output.result("" if whole else " …")
            output.event("answer", text="".join(answer), interrupted=not whole)
            messages.append({"role": "assistant", "content": "".join(answer)})


async def _answer(
    output: Output,
    model: RemoteModel,
    messages: list[dict[str, str]],
    sampling: dict[str, Any],
    answer: list[str],
) -> None:
    async for piece in model.generate(messages, **sampling):
        answer.append(piece)
        output.piece(piece)
