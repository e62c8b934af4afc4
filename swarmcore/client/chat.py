"""A conversation with a model, over one session."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from swarmcore.client.settings import GenerationOptions
from swarmcore.errors import InputError, SwarmError

if TYPE_CHECKING:
    from swarmcore.client.generation import Generation
    from swarmcore.client.model import RemoteModel
    from swarmcore.client.model_session import ModelSession


class Chat:
    """Turns of a user and a model. Made by `RemoteModel.chat`; leaving it frees the caches on the servers.

    Nothing that was said is computed again, as long as the servers of the session live; when one is gone, the
    next turn opens another session; so it does after any other error but a mistaken input.
    """

    def __init__(self, model: RemoteModel, system: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        """What was said so far, as the model's chat template takes it. You may change it between turns."""
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.generation: Generation | None = None
        """How the latest answer is made: its tokens, chain, times; None before its session is open."""
        self._model = model
        self._session: ModelSession | None = None
        self._answer: AsyncGenerator[str, None] | None = None

    def say(self, text: str, **options: Unpack[GenerationOptions]) -> AsyncGenerator[str, None]:
        """The pieces of the model's answer. ``options`` as in `RemoteModel.generate`.

        An answer that is left early stays in `messages` as far as it came; when nothing came, what was asked
        leaves them, too.
        """
        self._answer = self._answering(text, self._answer, options)
        return self._answer

    async def close(self) -> None:
        """Free the caches on the servers; the messages stay, and another turn opens a new session."""
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.aclose()
        await self._close_session()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _answering(
        self, text: str, previous: AsyncGenerator[str, None] | None, options: GenerationOptions
    ) -> AsyncGenerator[str, None]:
        if previous is not None:
            await previous.aclose()  # a loop over it may have been left, and nobody told the generator
        said: list[str] = []
        self.generation = None
        self.messages.append({"role": "user", "content": text})
        try:
            if self._session is None:
                self._session = await self._model.session().open()
            self.generation = self._model.generate(list(self.messages), session=self._session, **options)
            async with aclosing(self.generation) as pieces:
                async for piece in pieces:
                    said.append(piece)
                    yield piece
        except InputError:
            raise
        except SwarmError:
            await self._close_session()
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()

    async def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
