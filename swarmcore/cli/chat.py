"""``swarmcore chat``: a conversation on the terminal."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.options import one_line, remote_model_options, sampling_options, standard
from swarmcore.cli.output import Output
from swarmcore.cli.remote import RemoteModelOptions, given, remote_model
from swarmcore.cli.turns import turns
from swarmcore.errors import SwarmError

if TYPE_CHECKING:
    from swarmcore.client.generation import Generation
    from swarmcore.client.model import RemoteModel
    from swarmcore.client.model_session import ModelSession


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
        chain = swarm.chain(model.info)
        output.remark(f"{model.info.name} over {chain}. Ctrl-C stops an answer, Ctrl-D leaves.")
        output.event("ready", model=model.info.name, chain=str(chain))
        conversation = Conversation(output, model, system, sampling)
        try:
            async for line in said:
                await conversation.turn(line)
        finally:
            await conversation.close()


class Conversation:
    """Turns over one session, so that what was said before is not computed again."""

    def __init__(
        self, output: Output, model: RemoteModel, system: str | None, sampling: dict[str, Any]
    ) -> None:
        self._output = output
        self._model = model
        self._sampling = sampling
        self._messages = [{"role": "system", "content": system}] if system is not None else []
        self._session: ModelSession | None = None

    async def turn(self, said: str) -> None:
        """Answer; an error of the swarm ends this turn only, and the next one begins a new session."""
        answer: list[str] = []
        self._messages.append({"role": "user", "content": said})
        try:
            generation = await self._begin()
            whole = await interrupt.finished(self._show(generation, answer))
        except SwarmError as exc:
            self._output.remark(f"error: {one_line(exc)}")
            self._output.event("error", error=type(exc).__name__, message=str(exc), details=exc.details)
            self._messages.pop()
            await self.close()
            return
        self._output.result("" if whole else " …")
        self._output.event(
            "answer",
            text="".join(answer),
            finish_reason=generation.finish_reason if whole else "interrupted",
            prompt_tokens=generation.prompt_tokens,
            new_tokens=generation.new_tokens,
            chain=str(generation.chain),
        )
        self._messages.append({"role": "assistant", "content": "".join(answer)})

    async def close(self) -> None:
        """Give the session's cache back."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _begin(self) -> Generation:
        if self._session is None:
            self._session = self._model.session()
        await self._session.open()
        return self._model.generate(self._messages, session=self._session, **self._sampling)

    async def _show(self, generation: Generation, answer: list[str]) -> None:
        async with generation:
            async for piece in generation:
                answer.append(piece)
                self._output.piece(piece)
