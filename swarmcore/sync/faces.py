"""The synchronous classes, made of the asynchronous ones by .ci/generate_sync.py: change those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from swarmcore.loop_thread import background_loop
from swarmcore.sync.waiting import Face, Pieces, SwarmFace, WholeText, awaited

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from swarmcore.client import swarm as _swarm
    from swarmcore.client.autograd.options import PassOptions
    from swarmcore.client.autograd.remote_blocks import RemoteBlocks
    from swarmcore.client.generation import chat as _chat
    from swarmcore.client.generation import generation as _generation
    from swarmcore.client.generation import model as _model
    from swarmcore.client.generation import remote as _remote
    from swarmcore.client.generation import stream as _stream
    from swarmcore.client.generation import token_session as _token_session
    from swarmcore.client.generation.session_api import Reply
    from swarmcore.client.generation.stream import FinishReason
    from swarmcore.client.served_models import ServedModel
    from swarmcore.client.session.options import SessionOptions
    from swarmcore.client.speculation.counts import SpeculationCounts
    from swarmcore.generation_settings import GenerationOptions
    from swarmcore.identity import Identity
    from swarmcore.prompts import EncodedPrompt, Prompt
    from swarmcore.registry.base import SwarmView
    from swarmcore.registry.choice import RegistryChoice
    from swarmcore.routing.chain import Chain
    from swarmcore.routing.costs import ChainCost
    from swarmcore.session.steps import SentStep
    from swarmcore.training.adapter import BlockAdapter
    from swarmcore.training.prompt import SoftPrompt
    from swarmcore.types import ModelInfo, Numerics, PeerId, Progress, Span
    from swarmcore.wire.limits import Limits
    from swarmcore.wire.messages import InfoReply


def connect(
    *bootstrap: str,
    identity: Identity | None = None,
    transports: Sequence[str] = (),
    transport_options: Mapping[str, Mapping[str, Any]] | None = None,
    mdns: bool = False,
    registry: RegistryChoice = "gossip",
    allowed_servers: Collection[PeerId] | None = None,
    blocked_servers: Collection[PeerId] = (),
    max_hops: int | None = None,
    limits: Limits | None = None,
) -> Swarm:
    """As `swarmcore.connect`. Close it in the end, or use it as a context manager; else it is
    closed when the process ends."""
    from swarmcore.client import swarm

    async def joined() -> _swarm.Swarm:
        return await swarm.connect(
            *bootstrap,
            identity=identity,
            transports=transports,
            transport_options=transport_options,
            mdns=mdns,
            registry=registry,
            allowed_servers=allowed_servers,
            blocked_servers=blocked_servers,
            max_hops=max_hops,
            limits=limits,
        )

    loop = background_loop()
    return Swarm(loop, loop.run(joined()))


class Swarm(SwarmFace):
    """`swarmcore.Swarm`, waiting."""

    asynchronous: _swarm.Swarm

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        adapter: str = "",
        patience: float = 60.0,
        **options: Unpack[GenerationOptions],
    ) -> RemoteGeneration:
        """Continue a text, or answer chat messages, without torch and without any part of the model: a
        *generation server*, which was started with ``--serve-head``, runs tokenizer, embeddings, head and
        sampling.
        """
        return RemoteGeneration(
            self.loop,
            self.asynchronous.generate(prompt, model=model, adapter=adapter, patience=patience, **options),
        )

    def generation_model(self, model: str = "") -> ModelInfo:
        """The one of which generation servers make texts when `generate` is given ``model``."""
        return self.loop.call(lambda: self.asynchronous.generation_model(model))

    def chat(self, *, system: str | None = None, model: str = "") -> Chat:
        """A conversation in which generation servers answer: ``for piece in chat.say("Hello")``."""
        return Chat(self.loop, self.asynchronous.chat(system=system, model=model))

    def load_model(
        self,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
        executor: str = "auto",
        cache_dir: Path | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        draft: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Load embeddings, head and tokenizer of a model, for its blocks to be run by the swarm."""
        return Model(
            self.loop,
            self.loop.run(
                self.asynchronous.load_model(
                    name_or_path,
                    dtype=dtype,
                    revision=revision,
                    threads=threads,
                    executor=executor,
                    cache_dir=cache_dir,
                    session_options=session_options,
                    pass_options=pass_options,
                    draft=draft,
                    progress=progress,
                )
            ),
        )

    def view(self) -> SwarmView:
        """Who serves what, as known now. Raise `InputError`, as all else does, when it was never joined."""
        return self.loop.call(lambda: self.asynchronous.view())

    @property
    def paths(self) -> Mapping[PeerId, str]:
        """How peers called lately were reached: ``"direct"``, ``"hole-punched"`` or ``"relayed"``."""
        return self.asynchronous.paths

    def chain(
        self, model: ModelInfo, *, tokens: int = 0, blocked: Collection[PeerId] = (), span: Span | None = None
    ) -> Chain:
        """The chain that a session opened now would take. Raises as `Router.plan` does."""
        return self.loop.call(
            lambda: self.asynchronous.chain(model, tokens=tokens, blocked=blocked, span=span)
        )

    def route(self, model: ModelInfo, chain: Chain) -> ChainCost:
        """What a token is expected to take through ``chain``, stage by stage; as text, a table."""
        return self.loop.call(lambda: self.asynchronous.route(model, chain))

    def wait_for_blocks(self, model: ModelInfo, *, timeout: float) -> Chain:
        """Wait until servers cover every block of ``model``; return the chain."""
        return self.loop.run(self.asynchronous.wait_for_blocks(model, timeout=timeout))

    def served(self, name: str | None = None) -> ServedModel | None:
        """The model of the swarm that ``name`` stands for, as `Swarm.load_model` finds it."""
        return self.loop.call(lambda: self.asynchronous.served(name))

    def info(self, peer: PeerId, *, timeout: float = 5.0) -> InfoReply:
        """Ask a server of the view about itself. Raise `PeerUnreachableError` when it is not in the view."""
        return self.loop.run(self.asynchronous.info(peer, timeout=timeout))


class Model(Face):
    """`swarmcore.RemoteModel`, waiting."""

    asynchronous: _model.RemoteModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.asynchronous.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase) -> None:
        self.asynchronous.tokenizer = value

    @property
    def config(self) -> PretrainedConfig:
        return self.asynchronous.config

    @property
    def whole_config(self) -> PretrainedConfig:
        return self.asynchronous.whole_config

    @property
    def generation_config(self) -> GenerationConfig:
        return self.asynchronous.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.asynchronous.generation_config = value

    @property
    def info(self) -> ModelInfo:
        return self.asynchronous.info

    @property
    def blocks(self) -> RemoteBlocks:
        """All blocks as a module of PyTorch; a slice of it is some of them. Gradients go through it."""
        return self.asynchronous.blocks

    def session(
        self,
        *,
        sequences: int = 1,
        max_tokens: int = 1024,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        namespace: str = "",
    ) -> Session:
        """A session for hand-made loops, or for several turns of `generate`: ``with model.session()``."""
        return Session(
            self.loop,
            self.loop.run(
                self.asynchronous.session(
                    sequences=sequences,
                    max_tokens=max_tokens,
                    adapter=adapter,
                    soft_prompt=soft_prompt,
                    namespace=namespace,
                ).open()
            ),
        )

    def generate(
        self,
        prompt: Prompt | EncodedPrompt,
        *,
        session: Session | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        so_far: Sequence[int] = (),
        namespace: str = "",
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Continue a text, or answer chat messages: iterate over its pieces as they come, or take `text`."""
        inner = session.asynchronous if session is not None else None
        return Generation(
            self.loop,
            self.asynchronous.generate(
                prompt,
                session=inner,
                adapter=adapter,
                soft_prompt=soft_prompt,
                so_far=so_far,
                namespace=namespace,
                **options,
            ),
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        session: Session | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[str]:
        """Continue several prompts, of any lengths, in one session: each as `generate` alone would."""
        inner = session.asynchronous if session is not None else None
        return self.loop.run(
            awaited(
                self.asynchronous.generate_batch(
                    prompts, session=inner, adapter=adapter, soft_prompt=soft_prompt, **options
                )
            )
        )

    def chat(self, *, system: str | None = None) -> Chat:
        """A conversation: ``with model.chat() as chat: for piece in chat.say("Hello")``."""
        return Chat(self.loop, self.asynchronous.chat(system=system))


class Session(Face):
    """`swarmcore.ModelSession`, waiting."""

    asynchronous: _token_session.ModelSession

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each sequence that are in the remote caches."""
        return self.asynchronous.tokens

    @property
    def positions(self) -> tuple[int, ...]:
        """How many tokens of each sequence are in the remote caches."""
        return self.asynchronous.positions

    @property
    def max_in_flight(self) -> int:
        """Steps that may be under way at a time: 1 where a server cannot be told to drop one."""
        return self.asynchronous.max_in_flight

    @property
    def chain(self) -> Chain:
        """The servers that the session passes through now; none before it is open."""
        return self.asynchronous.chain

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of the session have computed so far, each way once; see `Generation.numerics`."""
        return self.asynchronous.numerics

    def step(
        self, ids: Sequence[Sequence[int]], *, sources: Sequence[int] = (), reply: Reply = "last"
    ) -> torch.Tensor:
        """Append new tokens to each sequence and return what the model predicts after the last of them."""
        return self.loop.run(self.asynchronous.step(ids, sources=sources, reply=reply))

    def send(self, ids: Sequence[Sequence[int]], *, reply: Reply = "all") -> SentStep:
        """Append new tokens to each sequence, behind the steps that are under way; see `receive`."""
        return self.loop.run(self.asynchronous.send(ids, reply=reply))

    def receive(self, step: SentStep) -> torch.Tensor:
        """What the model predicts after the tokens that were sent, float32 ``[rows, vocabulary]``."""
        return self.loop.run(self.asynchronous.receive(step))

    def recall(self, step: SentStep) -> None:
        """Give up a step that was not received, and all that were sent behind it."""
        self.loop.run(self.asynchronous.recall(step))

    def rollback(self, positions: int | Sequence[int]) -> None:
        """Forget the tokens of each sequence from its position on: one for all, or one for each."""
        self.loop.call(lambda: self.asynchronous.rollback(positions))


class Chat(Face):
    """`swarmcore.client.generation.chat.Chat`, waiting."""

    asynchronous: _chat.Chat[Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.asynchronous.messages

    @messages.setter
    def messages(self, value: list[dict[str, Any]]) -> None:
        self.asynchronous.messages = value

    def say(self, text: str, **options: Unpack[GenerationOptions]) -> Pieces[str]:
        """The pieces of the model's answer. ``options`` as in `RemoteModel.generate`."""
        return Pieces(self.loop, self.asynchronous.say(text, **options))


class Text(WholeText):
    """`swarmcore.client.generation.stream.TextStream`, waiting."""

    asynchronous: _stream.TextStream

    @property
    def tokens(self) -> list[int]:
        """The tokens generated so far, the one that ended the text included."""
        return self.asynchronous.tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 before it starts."""
        return self.asynchronous.prompt_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self.asynchronous.finish_reason

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of its session have computed, each way once; nothing as long as that is not known.
        With more than one the text may differ from what servers of either make alone, from a near tie on.
        """
        return self.asynchronous.numerics

    @property
    def speculation(self) -> SpeculationCounts:
        """What drafts have brought so far; nothing where a generation server makes the text."""
        return self.asynchronous.speculation

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, of all texts."""
        return self.asynchronous.new_tokens

    @property
    def seconds(self) -> float:
        """From the start to the end, or to now; by the event loop's clock."""
        return self.asynchronous.seconds

    @property
    def first_token_seconds(self) -> float | None:
        """From the start to the first piece of text; None before it."""
        return self.asynchronous.first_token_seconds


class Generation(Text):
    """`swarmcore.Generation`, waiting."""

    asynchronous: _generation.Generation

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that servers had computed before, in its session or an earlier one."""
        return self.asynchronous.cached_tokens

    @property
    def chain(self) -> Chain:
        """The servers that it passes through."""
        return self.asynchronous.chain


class RemoteGeneration(Text):
    """`swarmcore.RemoteGeneration`, waiting."""

    asynchronous: _remote.RemoteGeneration

    @property
    def server(self) -> PeerId | None:
        """The generation server that makes it now; None before it starts."""
        return self.asynchronous.server

    @property
    def failovers(self) -> int:
        """How often another generation server has gone on with it."""
        return self.asynchronous.failovers
