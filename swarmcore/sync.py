"""swarmcore without asyncio, for scripts and notebooks: the same names, and every call waits.

    import swarmcore.sync

    with swarmcore.sync.connect("tcp://…") as swarm:
        model = swarm.load_model("…")
        for piece in model.generate("The capital of France is"):
            print(piece, end="", flush=True)

Everything runs on one event loop in a thread of its own, so that it works where a loop is already running, as
in a notebook. Ctrl-C stops what is waited for, and cleans up after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

from swarmcore.loop_thread import LoopThread, background_loop

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from swarmcore.client import swarm as _swarm
    from swarmcore.client.autograd.options import PassOptions
    from swarmcore.client.autograd.remote_blocks import RemoteBlocks
    from swarmcore.client.generation import chat as _chat
    from swarmcore.client.generation import generation as _generation
    from swarmcore.client.generation import model as _model
    from swarmcore.client.generation import remote as _thin
    from swarmcore.client.generation import token_session as _model_session
    from swarmcore.client.generation.stream import FinishReason, GenerationStream
    from swarmcore.client.session.options import SessionOptions
    from swarmcore.generation_settings import GenerationOptions
    from swarmcore.prompts import Prompt
    from swarmcore.registry.base import SwarmView
    from swarmcore.routing.chain import Chain
    from swarmcore.routing.costs import ChainCost
    from swarmcore.training.adapter import BlockAdapter
    from swarmcore.training.prompt import SoftPrompt
    from swarmcore.types import ModelInfo, PeerId, Progress

Piece = TypeVar("Piece", covariant=True)


def connect(*bootstrap: str, **options: Any) -> Swarm:
    """Join the swarm that any of the ``bootstrap`` addresses is a member of; see `swarmcore.connect`.

    Close it in the end, or use it as a context manager; else it is closed when the process ends.
    """
    from swarmcore.client import swarm

    async def entered() -> _swarm.Swarm:
        return await swarm.connect(*bootstrap, **options)

    loop = background_loop()
    return Swarm(loop, loop.run(entered()))


class Closing(ABC):
    """A context manager that closes itself at the end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Swarm(Closing):
    """`swarmcore.Swarm`, waiting."""

    def __init__(self, loop: LoopThread, swarm: _swarm.Swarm) -> None:
        self.loop = loop
        self.asynchronous = swarm
        loop.opened(self)

    def load_model(
        self,
        name_or_path: str | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
        cache_dir: Path | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """As `swarmcore.Swarm.load_model`; ``progress`` is called in another thread."""
        loading = self.asynchronous.load_model(
            name_or_path,
            dtype=dtype,
            revision=revision,
            threads=threads,
            cache_dir=cache_dir,
            session_options=session_options,
            pass_options=pass_options,
            progress=progress,
        )
        return Model(self.loop, self.loop.run(loading))

    def generate(
        self, prompt: Prompt, *, model: str = "", adapter: str = "", **options: Unpack[GenerationOptions]
    ) -> RemoteGeneration:
        """As `swarmcore.Swarm.generate`. Iterate over the pieces, or take `RemoteGeneration.text`."""
        generation = self.asynchronous.generate(prompt, model=model, adapter=adapter, **options)
        return RemoteGeneration(self.loop, generation)

    def chat(self, *, system: str | None = None, model: str = "") -> Chat:
        return Chat(self.loop, self.asynchronous.chat(system=system, model=model))

    def view(self) -> SwarmView:
        return self.asynchronous.view()

    def chain(self, model: ModelInfo) -> Chain:
        async def chain() -> Chain:
            return self.asynchronous.chain(model)

        return self.loop.run(chain())

    def route(self, model: ModelInfo, chain: Chain) -> ChainCost:
        async def route() -> ChainCost:
            return self.asynchronous.route(model, chain)

        return self.loop.run(route())

    def wait_for_blocks(self, model: ModelInfo, *, timeout: float) -> Chain:
        return self.loop.run(self.asynchronous.wait_for_blocks(model, timeout=timeout))

    def close(self) -> None:
        """Close the swarm and the models loaded from it. Harmless when repeated."""
        self.loop.closed(self)
        self.loop.run(self.asynchronous.close())

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class Model:
    """`swarmcore.RemoteModel`, waiting."""

    def __init__(self, loop: LoopThread, model: _model.RemoteModel) -> None:
        self._loop = loop
        self._model = model
        self.config: PretrainedConfig = model.config
        self.whole_config: PretrainedConfig = model.whole_config
        self.info: ModelInfo = model.info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As `swarmcore.RemoteModel.tokenizer`."""
        return self._model.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model.tokenizer = tokenizer

    @property
    def generation_config(self) -> GenerationConfig:
        """As `swarmcore.RemoteModel.generation_config`."""
        return self._model.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._model.generation_config = config

    def generate(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Iterate over the pieces of text, or take it whole with `Generation.text`."""
        inner = session.asynchronous if session is not None else None
        generation = self._model.generate(
            prompt, session=inner, adapter=adapter, soft_prompt=soft_prompt, **options
        )
        return Generation(self._loop, generation)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        session: Session | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[str]:
        """The texts of all prompts, generated together."""
        inner = session.asynchronous if session is not None else None

        async def texts() -> list[str]:
            return await self._model.generate_batch(
                prompts, session=inner, adapter=adapter, soft_prompt=soft_prompt, **options
            )

        return self._loop.run(texts())

    @property
    def blocks(self) -> RemoteBlocks:
        """As `swarmcore.RemoteModel.blocks`."""
        return self._model.blocks

    def chat(self, *, system: str | None = None) -> Chat:
        return Chat(self._loop, self._model.chat(system=system))

    def session(
        self,
        *,
        sequences: int = 1,
        max_tokens: int = 1024,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
    ) -> Session:
        """An open session; close it, or use it as a context manager."""
        session = self._model.session(
            sequences=sequences, max_tokens=max_tokens, adapter=adapter, soft_prompt=soft_prompt
        )
        return Session(self._loop, self._loop.run(session.open()))

    def close(self) -> None:
        self._loop.run(self._model.close())

    def __repr__(self) -> str:
        return repr(self._model)


class Session(Closing):
    """`swarmcore.ModelSession`, waiting."""

    def __init__(self, loop: LoopThread, session: _model_session.ModelSession) -> None:
        self._loop = loop
        self.asynchronous = session

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return self.asynchronous.tokens

    @property
    def positions(self) -> tuple[int, ...]:
        return self.asynchronous.positions

    def step(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._loop.run(self.asynchronous.step(ids))

    def rollback(self, positions: int | Sequence[int]) -> None:
        self.asynchronous.rollback(positions)

    def close(self) -> None:
        self._loop.run(self.asynchronous.close())

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class Pieces(Generic[Piece]):
    """An iterator over what an asynchronous generator makes, one piece for each turn."""

    def __init__(
        self, loop: LoopThread, pieces: AsyncGenerator[Piece, None] | GenerationStream[Piece]
    ) -> None:
        self._loop = loop
        self._pieces: Any = pieces

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece: Piece | None = self._loop.run(self._next())
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End it here, and clean up. Harmless when it has ended."""
        self._loop.run(self._pieces.aclose())

    async def _next(self) -> Piece | None:
        try:
            found: Piece = await anext(self._pieces)
        except StopAsyncIteration:  # it cannot leave a task
            return None
        return found


class Generation(Pieces[str]):
    """`swarmcore.Generation`, waiting."""

    def __init__(self, loop: LoopThread, generation: _generation.Generation) -> None:
        super().__init__(loop, generation)
        self.asynchronous = generation

    def text(self) -> str:
        """The whole text, or what is left of it."""
        return "".join(self)

    @property
    def tokens(self) -> list[int]:
        return self.asynchronous.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.asynchronous.finish_reason

    @property
    def seconds(self) -> float:
        return self.asynchronous.seconds

    @property
    def chain(self) -> Chain:
        return self.asynchronous.chain

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class RemoteGeneration(Pieces[str]):
    """`swarmcore.client.generation.remote.RemoteGeneration`, waiting."""

    def __init__(self, loop: LoopThread, generation: _thin.RemoteGeneration) -> None:
        super().__init__(loop, generation)
        self.asynchronous = generation

    def text(self) -> str:
        """The whole text, or what is left of it."""
        return "".join(self)

    @property
    def tokens(self) -> list[int]:
        return self.asynchronous.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.asynchronous.finish_reason

    @property
    def seconds(self) -> float:
        return self.asynchronous.seconds

    @property
    def server(self) -> PeerId | None:
        return self.asynchronous.server

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class Chat(Closing):
    """A `swarmcore.client.generation.chat.Chat`, waiting."""

    def __init__(self, loop: LoopThread, chat: _chat.Chat[Any]) -> None:
        self._loop = loop
        self._chat = chat

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self._chat.messages

    def say(self, text: str, **options: Unpack[GenerationOptions]) -> Pieces[str]:
        """Iterate over the pieces of the answer."""
        return Pieces(self._loop, self._chat.say(text, **options))

    def close(self) -> None:
        self._loop.run(self._chat.close())
