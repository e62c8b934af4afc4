"""Conversations: over one session with a model, or with generation servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

from swarmcore.client.generation.detokenizer import GeneratedPieces
from swarmcore.errors import InputError, SwarmError
from swarmcore.generation_settings import GenerationOptions, GenerationSettings
from swarmcore.prompts import check_text

if TYPE_CHECKING:
    from swarmcore.client.generation.generation import Generation
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.client.generation.remote import ThinGeneration
    from swarmcore.client.generation.token_session import ModelSession

Made = TypeVar("Made", bound=GeneratedPieces[str])


class Conversation(ABC, Generic[Made]):
    """Turns of a user and a model, and what was said in them."""

    def __init__(self, system: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        """What was said so far, as the model's chat template takes it. You may change it between turns."""
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.generation: Made | None = None
        """How the latest answer is made: its tokens, times and more; None before it has begun."""
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
        await self._let_go()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    @abstractmethod
    async def _generate(self, options: GenerationOptions) -> Made:
        """Begin the answer to `messages`."""

    async def _let_go(self) -> None:
        """Close what outlives a turn."""

    async def _answering(
        self, text: str, previous: AsyncGenerator[str, None] | None, options: GenerationOptions
    ) -> AsyncGenerator[str, None]:
        if previous is not None:
            await previous.aclose()  # a loop over it may have been left, and nobody told the generator
        said: list[str] = []
        self.generation = None
        self.messages.append({"role": "user", "content": text})
        try:
            self.generation = await self._generate(options)
            async with aclosing(self.generation) as pieces:
                async for piece in pieces:
                    said.append(piece)
                    yield piece
        except InputError:
            raise
        except SwarmError:
            await self._let_go()
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()


class Chat(Conversation["Generation"]):
    """Turns of a user and a model. Made by `RemoteModel.chat`; leaving it frees the caches on the servers.

    Nothing that was said is computed again, as long as the servers of the session live; when one is gone, the
    next turn opens another session; so it does after any other error but a mistaken input.
    """

    def __init__(self, model: RemoteModel, system: str | None) -> None:
        super().__init__(system)
        self._model = model
        self._session: ModelSession | None = None

    async def _generate(self, options: GenerationOptions) -> Generation:
        if self._session is None:
            self._session = await self._model.session().open()
        return self._model.generate(list(self.messages), session=self._session, **options)

    async def _let_go(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class ThinChat(Conversation["ThinGeneration"]):
    """Turns of a user and a model that generation servers run. Made by `Swarm.chat`.

    Generation servers keep nothing from one turn to the next: each is computed from the first message on.
    """

    def __init__(self, generate: Callable[..., ThinGeneration], system: str | None) -> None:
        """``generate`` is `Swarm.generate` for one model."""
        super().__init__(system)
        self._generate_at_heads = generate

    async def _generate(self, options: GenerationOptions) -> ThinGeneration:
        return self._generate_at_heads(list(self.messages), **options)
