"""Conversations: over one session with a model, or with generation servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

from swarmcore.client.generation.stream import TextStream
from swarmcore.errors import InputError, SwarmError
from swarmcore.generation_settings import GenerationOptions, GenerationSettings
from swarmcore.prompts import check_text

if TYPE_CHECKING:
    from swarmcore.client.generation.token_session import ModelSession

Answer = TypeVar("Answer", bound=TextStream)


class Chat(Generic[Answer]):
    """Turns of a user and a model, and what was said in them. Made by `RemoteModel.chat` and `Swarm.chat`.

    With a model, nothing that was said is computed again, as long as the servers of the chat's session live;
    when one is gone, the next turn opens another session; so it does after any other error but a mistaken
    input. Leaving the chat frees the caches on the servers. Generation servers keep nothing from one turn to
    the next: each is computed from the first message on.
    """

    messages: list[dict[str, Any]]
    """What was said so far, as the model's chat template takes it. You may change it between turns."""

    def __init__(
        self,
        generate: Callable[..., Answer],
        system: str | None,
        *,
        open_session: Callable[[], ModelSession] | None = None,
    ) -> None:
        """``generate`` is given the messages and settings, and a session to open where there is one."""
        self.messages = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.generation: Answer | None = None
        """How the latest answer is made: its tokens, times and more; None before it has begun."""
        self._generate = generate
        self._open_session = open_session
        self._session: ModelSession | None = None
        self._answer: AsyncGenerator[str, None] | None = None

    def say(self, text: str, **options: Unpack[GenerationOptions]) -> AsyncGenerator[str, None]:
        """The pieces of the model's answer. ``options`` as in `RemoteModel.generate`.

        An answer that is left early stays in `messages` as far as it came; when nothing came, what was asked
        leaves them, too. Raise `InputError` at once for settings out of range, and for what is no text.
        """
        if not isinstance(text, str):
            raise InputError(f"what is said in a chat is a text; got {type(text).__name__} {text!r:.80}")
        check_text("the text", text)
        GenerationSettings.of(options)
        self._answer = self._answering(text, self._answer, options)
        return self._answer

    async def close(self) -> None:
        """Let go of what was opened; the messages stay, and there may be another turn."""
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
            if self._open_session is not None and self._session is None:
                self._session = self._open_session()
            session = {} if self._session is None else {"session": self._session}
            self.generation = self._generate(list(self.messages), **session, **options)
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
