"""A language model whose blocks the swarm runs: embeddings, head, sampling and text are here."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import swarmcore.executor.torch  # noqa: F401  (before all else: it says which extra is missing)
from swarmcore.checkpoint import Checkpoint
from swarmcore.client.autograd.bridge import Bridge
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.packing import snapshot
from swarmcore.client.autograd.remote_blocks import RemoteBlocks
from swarmcore.client.connection import SwarmConnection
from swarmcore.client.generation.chat import Chat
from swarmcore.client.generation.compute import ModelCompute
from swarmcore.client.generation.continuation import Continuation
from swarmcore.client.generation.detokenizer import (
    IncrementalDetokenizer,
    StopStrings,
    TokenKinds,
    token_kinds,
)
from swarmcore.client.generation.draft_loading import load_draft
from swarmcore.client.generation.generation import (
    BatchGeneration,
    Generation,
    GenerationRun,
    generate_pieces,
)
from swarmcore.client.generation.generation_config import (
    check_generation_config,
    end_of_text,
    load_generation_config,
    logits_processors,
    most_tokens,
    stop_strings,
)
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.generation.sampling import Sampler
from swarmcore.client.generation.session_api import SessionOpener
from swarmcore.client.generation.stream import GeneratedText
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.client.served_models import open_model
from swarmcore.client.session.session import SessionOptions
from swarmcore.client.speculation.drafter import DraftSource
from swarmcore.client.speculation.speculator import Speculator
from swarmcore.errors import AdapterError, InputError
from swarmcore.generation_settings import GenerationOptions, GenerationSettings
from swarmcore.prompts import (
    EncodedPrompt,
    Prompt,
    check_tokens,
    checked_ids,
    encode_prompt,
    load_tokenizer,
)
from swarmcore.types import ModelInfo, Progress, Span

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from swarmcore.training.adapter import BlockAdapter
    from swarmcore.training.prompt import SoftPrompt


class RemoteModel:
    """A causal language model; made by `Swarm.load_model`, closed with its swarm.

    Any number of generations and sessions may run at the same time, on one event loop: their torch work
    shares one thread, and passes through embeddings and head.
    """

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    """Of the text model, without blocks: ``num_hidden_layers`` is 0. The number of blocks is in `info`."""
    whole_config: PretrainedConfig
    """Of the whole model, as adapters are made for it: ``LoraAdapter.for_model(model.whole_config)``."""
    generation_config: GenerationConfig
    """The model's own defaults: its end-of-text tokens, penalties, filters."""
    info: ModelInfo

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        compute: ModelCompute,
        open_session: SessionOpener,
        whole_config: PretrainedConfig,
        drafts: Sequence[DraftSource] = (),
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.config = compute.parts.config
        self.whole_config = whole_config
        self._compute = compute
        self._open_session = open_session
        self._speculator = Speculator(compute.parts.vocab_size, drafts)
        self._sessions: set[ModelSession] = set()
        self._bridge: Bridge | None = None

    def __repr__(self) -> str:
        return f"<RemoteModel {self.info.name} · {self.info.blocks} blocks · {len(self._sessions)} sessions>"

    @classmethod
    async def load(
        cls,
        swarm: SwarmConnection,
        name_or_path: str | None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
        executor: str = "auto",
        cache_dir: Path | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        draft: str | None = None,
        progress: Progress | None = None,
    ) -> RemoteModel:
        """What `Swarm.load_model` does. ``progress`` is called in another thread."""
        find = functools.partial(open_model, name_or_path, swarm.served(name_or_path))
        compute = ModelCompute(threads)
        stopping = threading.Event()

        def report(what: str, done: int, total: int) -> None:
            if stopping.is_set():
                raise InterruptedError("loading was cancelled")
            if progress is not None:
                progress(what, done, total)

        try:
            checkpoint = await compute.run(
                functools.partial(find, revision=revision, cache_dir=cache_dir, progress=report)
            )
            open_session = functools.partial(swarm.open_session, checkpoint.info, options=session_options)
            model = await cls.from_checkpoint(
                checkpoint,
                open_session,
                dtype=dtype,
                executor=executor,
                compute=compute,
                draft=draft,
                progress=report,
            )
        except BaseException:
            stopping.set()
            await compute.close()
            raise
        model._bridge = Bridge(swarm, model.info, pass_options)
        return model

    @classmethod
    async def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        open_session: SessionOpener,
        *,
        dtype: str = "auto",
        executor: str = "torch",
        compute: ModelCompute | None = None,
        draft: str | None = None,
        progress: Progress | None = None,
    ) -> RemoteModel:
        """A model of ``checkpoint`` whose blocks are run by the sessions that ``open_session`` opens.

        ``executor`` and ``draft`` as in `Swarm.load_model`.
        """
        compute = compute or ModelCompute()
        await compute.load(
            functools.partial(LocalParts.load, checkpoint, dtype=dtype, executor=executor, progress=progress)
        )
        tokenizer = await compute.run(load_tokenizer, checkpoint.folder, checkpoint.name)
        generation_config = await compute.run(load_generation_config, checkpoint)
        drafts = []
        if draft is not None:
            load = functools.partial(
                load_draft, draft, checkpoint, compute.parts, tokenizer, dtype=dtype, progress=progress
            )
            drafts.append(await compute.run(load))
        config = checkpoint.config
        return cls(checkpoint.info, tokenizer, generation_config, compute, open_session, config, drafts)

    async def close(self) -> None:
        """Close the sessions and end the compute thread. Harmless when repeated."""
        for session in list(self._sessions):
            await session.close()
        if self._bridge is not None:
            await self._bridge.close()
        self._speculator.close()
        await self._compute.close()

    @property
    def blocks(self) -> RemoteBlocks:
        """All blocks as a module of PyTorch; a slice of it is some of them. Gradients go through it.

        Raise `InputError` for a model that was not loaded from a swarm.
        """
        if self._bridge is None:
            raise InputError("the blocks of a model take batches when it was loaded with Swarm.load_model")
        return RemoteBlocks(self._bridge, self.info, Span(0, self.info.blocks))

    def session(
        self,
        *,
        sequences: int = 1,
        max_tokens: int = 1024,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        namespace: str = "",
    ) -> ModelSession:
        """A session for hand-made loops, or for several turns of `generate`: ``async with model.session()``.

        ``max_tokens`` is what each sequence is expected to grow to; it is no limit. ``adapter`` is one of the
        client's own, as it is now, or the name of one that servers have; a ``soft_prompt`` goes before the
        tokens of every sequence. ``namespace`` keeps what servers cache of it apart from that of others, such
        as of other users of a service. Raise `AdapterError` for a soft prompt of another model.
        """
        weights = snapshot(adapter, Span(0, self.info.blocks))
        if soft_prompt is not None and soft_prompt.hidden_size != self.info.hidden_size:
            raise AdapterError(
                f"the soft prompt has hidden size {soft_prompt.hidden_size}, and {self.info.name} has "
                f"{self.info.hidden_size}: it was made for another model"
            )
        session = ModelSession(
            self._compute,
            functools.partial(self._open_session, adapter=weights),
            sequences=sequences,
            max_tokens=max_tokens,
            on_close=self._sessions.discard,
            soft_prompt=None if soft_prompt is None else soft_prompt.embeddings.detach().clone(),
            prefix_tokens=0 if adapter is None or isinstance(adapter, str) else adapter.prefix_tokens,
            namespace=namespace,
        )
        self._sessions.add(session)
        return session

    async def encode(
        self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> EncodedPrompt:
        """The tokens of a prompt, which `generate` takes in its place. Raises as that does for prompts."""
        return await self._compute.run(self._encode, prompt, chat_template_kwargs)

    def generate(
        self,
        prompt: Prompt | EncodedPrompt,
        *,
        session: ModelSession | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        so_far: Sequence[int] = (),
        namespace: str = "",
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Continue a text, or answer chat messages: iterate over its pieces as they come, or await it whole.

        ``options`` are the fields of `GenerationSettings`: ``max_new_tokens``, ``temperature``, ``top_k``,
        ``top_p``, ``min_p``, ``repetition_penalty``, ``stop``, ``seed`` and more. Without a temperature the
        choice is greedy, and equal to that of transformers' ``generate(do_sample=False)``.

        ``prompt`` is always the whole context; with a ``session`` (of one sequence) what it has in common
        with the session's tokens is not sent again. Without one, a session is opened and closed here, with
        ``adapter``, ``soft_prompt`` and ``namespace`` as in `session`.

        ``so_far`` are the tokens of an answer that broke off, to the same prompt with the same settings: it
        goes on where that was, greedy or with the same seed with what would have come next. The pieces are of
        what follows; `Generation.tokens` are all.

        Raise `InputError` at once for settings out of range, and at the first piece for a prompt that does
        not work; then whatever opening and stepping a session raise.
        """
        run = GenerationRun([GeneratedText()])
        settings = GenerationSettings.of(options)
        pieces = self._pieces(run, [prompt], settings, session, adapter, soft_prompt, so_far, namespace)
        return Generation(run, pieces)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        session: ModelSession | None = None,
        adapter: BlockAdapter | str | None = None,
        soft_prompt: SoftPrompt | None = None,
        **options: Unpack[GenerationOptions],
    ) -> BatchGeneration:
        """Continue several prompts, of any lengths, in one session: each as `generate` alone would.

        Iterate over ``(index of the prompt, piece of its text)``, or await the list of whole texts. A
        ``session`` must have as many sequences as there are prompts. Otherwise as `generate`.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes) or not prompts:
            raise InputError(
                f"generate_batch takes a list of prompts, at least one, and no array, whose rows may be "
                f"padded; for one prompt use generate; got {type(prompts).__name__}"
            )
        run = GenerationRun([GeneratedText() for _ in prompts])
        pieces = self._pieces(run, prompts, GenerationSettings.of(options), session, adapter, soft_prompt)
        return BatchGeneration(run, pieces)

    def chat(self, *, system: str | None = None) -> Chat[Generation]:
        """A conversation: ``async with model.chat() as chat: async for piece in chat.say("Hello")``."""
        return Chat(self.generate, system, open_session=self.session)

    def _pieces(
        self,
        run: GenerationRun,
        prompts: Sequence[Prompt | EncodedPrompt],
        settings: GenerationSettings,
        session: ModelSession | None,
        adapter: BlockAdapter | str | None,
        soft_prompt: SoftPrompt | None,
        so_far: Sequence[int] = (),
        namespace: str = "",
    ) -> AsyncGenerator[tuple[int, str], None]:
        if session is not None and (adapter is not None or soft_prompt is not None):
            raise InputError("a session has its adapter and soft prompt for life; pass them to model.session")
        if session is not None and session.sequences != len(prompts):
            raise InputError(
                f"the session has {session.sequences} sequences, for {len(prompts)} prompts; "
                f"open it with model.session(sequences={len(prompts)})"
            )

        async def prepare() -> list[Continuation]:
            continuations = await self._compute.run(self._continuations, run.texts, prompts, settings)
            if had := checked_ids(so_far):
                await self._compute.run(_resume, continuations[0], had, self._compute.parts.vocab_size)
                # Seconds, for thousands of tokens: not in the thread that all generations share.
                skip = continuations[0].sampler.skip
                await asyncio.to_thread(skip, len(had), self._compute.parts.vocab_size)
            return continuations

        def open_session(continuations: list[Continuation]) -> ModelSession:
            longest = max(continuation.max_length for continuation in continuations)
            return self.session(
                sequences=len(continuations),
                max_tokens=longest,
                adapter=adapter,
                soft_prompt=soft_prompt,
                namespace=namespace,
            )

        return generate_pieces(
            run, self._compute, prepare, session, open_session, self._speculator, settings.speculates
        )

    def _continuations(
        self,
        texts: Sequence[GeneratedText],
        prompts: Sequence[Prompt | EncodedPrompt],
        settings: GenerationSettings,
    ) -> list[Continuation]:
        check_generation_config(self.generation_config, self.info.name)
        kinds = token_kinds(self.tokenizer, self._decode)
        return [
            self._continuation(text, prompt, settings.for_prompt(i), kinds)
            for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
        ]

    def _continuation(
        self,
        text: GeneratedText,
        prompt: Prompt | EncodedPrompt,
        settings: GenerationSettings,
        kinds: TokenKinds,
    ) -> Continuation:
        parts = self._compute.parts
        encoded = self._encode(prompt, settings.chat_template_kwargs)
        text.prompt_tokens = length = len(encoded.tokens)
        limit = parts.max_positions
        if limit is not None and length >= limit:
            raise InputError(
                f"the prompt has {length} tokens, and the model takes {limit} in all; shorten it to leave "
                f"room for an answer"
            )
        own = self.generation_config
        end = most_tokens(own, settings, length)
        max_length = end if limit is None else min(end, limit)
        processors = logits_processors(
            own, settings, encoded.tokens, max_length=max_length, model_config=parts.config
        )
        return Continuation(
            text,
            encoded,
            max_length=max_length,
            eos=frozenset(end_of_text(own)),
            sampler=Sampler(encoded.tokens, processors, greedy=settings.greedy, seed=settings.seed),
            detokenizer=IncrementalDetokenizer(self._decode, encoded.context, kinds),
            stops=StopStrings(settings.stops or stop_strings(own)),
        )

    def _encode(
        self, prompt: Prompt | EncodedPrompt, chat_template_kwargs: Mapping[str, Any] | None
    ) -> EncodedPrompt:
        return encode_prompt(
            self.tokenizer,
            prompt,
            vocab_size=self._compute.parts.vocab_size,
            chat_template_kwargs=chat_template_kwargs,
        )

    def _decode(self, tokens: list[int]) -> str:
        # The text as the model wrote it: spaces before punctuation are not "cleaned up".
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _resume(continuation: Continuation, so_far: Sequence[int], vocab_size: int) -> None:
    check_tokens(so_far, vocab_size)
    for token in so_far:
        if continuation.finished:
            raise InputError("so_far goes on after what ends the text: it is of another prompt or settings")
        continuation.sampler.append(token)
        continuation.take(token)
