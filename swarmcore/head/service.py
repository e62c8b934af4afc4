"""The generate protocol on a server: makes texts for clients that have no part of the model.

What a client asks for becomes a prompt and settings, within the limits of a peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, Unpack

import attrs

from swarmcore.client.generation.stream import TextStream
from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.errors import (
    BusyError,
    InputError,
    ServerDrainingError,
    StreamClosedError,
    SwarmError,
    UnavailableError,
)
from swarmcore.generation_settings import (
    WIRE_SETTINGS,
    GenerationOptions,
    GenerationSettings,
    check_head_settings,
)
from swarmcore.head.queue import GenerationLimits, GenerationQueue
from swarmcore.prompts import EncodedPrompt, Prompt
from swarmcore.registry.base import SwarmView
from swarmcore.rpc.channel import Channel
from swarmcore.server.config import MAX_ADAPTER_NAME
from swarmcore.tasks import Deadline, deadline_after, running, wait_until_set
from swarmcore.types import ModelInfo, PeerId, short
from swarmcore.wire.generate import (
    AHEAD,
    GenerationEnded,
    GenerationStarted,
    OpenGeneration,
    TextPiece,
)

CHARACTERS_PER_TOKEN = 32
"""A prompt with more characters for each token that it may have is refused before it is made into tokens."""


def prompt_of(request: OpenGeneration, limits: GenerationLimits) -> Prompt:
    """Raise `InputError` unless there is exactly one prompt, `UnavailableError` for one above the limits."""
    given = [
        name
        for name, there in (
            ("text", request.text is not None),
            ("messages", bool(request.messages)),
            ("tokens", bool(request.tokens)),
        )
        if there
    ]
    if len(given) != 1:
        raise InputError(
            f"a generation has one prompt, in text, messages or tokens; got {' and '.join(given) or 'none'}"
        )
    characters = len(request.text or "")
    characters += sum(len(message.role) + len(message.content) for message in request.messages)
    if characters > CHARACTERS_PER_TOKEN * limits.prompt_tokens:
        raise UnavailableError(
            f"{given[0]}: {characters} characters are more than this generation server takes, whose prompts "
            f"have {limits.prompt_tokens} tokens at most",
            limit=limits.prompt_tokens,
        )
    if request.text is not None:
        return request.text
    if request.messages:
        return [{"role": message.role, "content": message.content} for message in request.messages]
    check_length(len(request.tokens), limits)
    return request.tokens


def check_length(tokens: int, limits: GenerationLimits) -> None:
    """Raise `UnavailableError` for a prompt of more tokens than the peer takes."""
    if tokens > limits.prompt_tokens:
        raise UnavailableError(
            f"the prompt has {tokens} tokens, and this generation server takes {limits.prompt_tokens} "
            f"at most",
            limit=limits.prompt_tokens,
        )


def settings_of(request: OpenGeneration, limits: GenerationLimits) -> GenerationOptions:
    """The settings, checked. Raise `InputError` for one out of its range, which it names, and
    `UnavailableError` for an answer longer than the peer makes."""
    options: Any = {name: getattr(request, name) for name in WIRE_SETTINGS}
    if request.default_length and request.max_new_tokens <= limits.new_tokens:
        options["max_new_tokens"] = None
    check_head_settings(GenerationSettings(**options))
    if request.max_new_tokens > limits.new_tokens:
        raise UnavailableError(
            f"max_new_tokens of {request.max_new_tokens} is more than this generation server makes of one "
            f"text: {limits.new_tokens}",
            limit=limits.new_tokens,
        )
    if len(request.so_far) > request.max_new_tokens:
        raise InputError(f"so_far has {len(request.so_far)} tokens, more than max_new_tokens")
    if len(request.adapter) > MAX_ADAPTER_NAME:
        raise InputError(f"adapter: a name has {MAX_ADAPTER_NAME} characters at most")
    found: GenerationOptions = options
    return found


logger = logging.getLogger(__name__)


class TextModel(Protocol):
    """What a generation server needs of a `RemoteModel`."""

    @property
    def info(self) -> ModelInfo: ...

    async def encode(self, prompt: Prompt) -> EncodedPrompt: ...

    def generate(
        self,
        prompt: EncodedPrompt,
        *,
        adapter: str | None = None,
        so_far: Sequence[int] = (),
        namespace: str = "",
        **options: Unpack[GenerationOptions],
    ) -> TextStream: ...


class GenerationService:
    """Serves `GENERATE_PROTOCOL` with one model, within ``limits``.

    Every text has a session of its own, as any client's: servers that fail are replaced under it.
    """

    def __init__(self, model: TextModel, limits: GenerationLimits | None = None, *, source: str = "") -> None:
        self.model = model
        self.announced = attrs.evolve(model.info, source=source)
        """What others are told of the model."""
        self.limits = limits or GenerationLimits()
        self.queue = GenerationQueue(at_once=self.limits.at_once, waiting=self.limits.waiting)
        self.draining = False
        self.counters: Counter[str] = Counter()
        self.speculation = SpeculationCounts()
        """What drafts have brought to all texts that have ended."""
        self._lifetimes: dict[Channel, asyncio.Timeout] = {}
        self._one_ended = asyncio.Event()

    def __repr__(self) -> str:
        return f"<GenerationService {self.model.info.name} · {self.queue!r}>"

    @property
    def note(self) -> str:
        """What it is at, in words."""
        texts = "text" if self.queue.under_way == 1 else "texts"
        note = f"head: makes {self.queue.under_way} {texts} for thin clients, {self.queue.queued} wait"
        return f"{note}; {self.speculation}" if self.speculation.drafted else note

    async def drain(self, seconds: float) -> int:
        """Take no more texts, and wait for up to ``seconds`` for those that are here.

        Return how many are left.
        """
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_ended()
        return len(self._lifetimes)

    async def leave(self, view: SwarmView, own: PeerId, seconds: float) -> None:
        """Send the clients to other generation servers of ``view`` at once; where there are none, let their
        texts end here, for up to ``seconds``."""
        others = any(self.model.info in server.heads for server in view if server.peer != own)
        await self.drain(0.0 if others else seconds)
        await self.close()

    async def close(self) -> None:
        """Send the clients that are here elsewhere; they go on there. Harmless when repeated."""
        self.draining = True
        for lifetime in self._lifetimes.values():
            if not lifetime.expired():
                lifetime.reschedule(asyncio.get_running_loop().time())
        await self._all_ended()

    async def _all_ended(self) -> None:
        while self._lifetimes:
            self._one_ended.clear()
            await self._one_ended.wait()

    async def serve(self, channel: Channel) -> None:
        """Handle one channel: its text's whole way."""
        request = channel.opening.record
        self._check(request)
        prompt, options = prompt_of(request, self.limits), settings_of(request, self.limits)
        lifetime = asyncio.timeout(None)
        reader = _Reader(channel, lifetime)
        try:
            async with running(reader.run(), "reader of a text"), lifetime:
                self._lifetimes[channel] = lifetime
                async with self._place(channel.remote):
                    await self._make(channel, reader, request, prompt, options)
        except TimeoutError as exc:
            if not lifetime.expired():
                raise
            if reader.end is None:
                raise ServerDrainingError(
                    "this generation server leaves; another one can go on with the text"
                ) from exc
            if not isinstance(reader.end, StreamClosedError):
                raise reader.end from exc
            self.counters["texts_left"] += 1
        finally:
            self._lifetimes.pop(channel, None)
            self._one_ended.set()

    def _check(self, request: OpenGeneration) -> None:
        info = self.model.info
        if self.draining:
            raise ServerDrainingError("this generation server is leaving and takes no new texts")
        if request.model not in ("", info.fingerprint, info.name):
            raise UnavailableError(
                f"model: this generation server makes texts of {info.name} ({info.fingerprint[:12]}), not of "
                f"{request.model[:100]!r}"
            )

    @asynccontextmanager
    async def _place(self, peer: PeerId) -> AsyncIterator[None]:
        """A place among the texts that are made. Raise `BusyError` when there is none in time."""
        now = asyncio.get_running_loop().time
        try:
            queued = self.queue.enter(peer)
        except BusyError:
            self.counters["texts_refused"] += 1
            raise
        began = None
        try:
            if not await wait_until_set(queued.may_begin, self.limits.queue_timeout):
                self.counters["texts_refused"] += 1
                raise BusyError(
                    f"no turn came in {self.limits.queue_timeout:g} s: this generation server makes "
                    f"{self.queue.at_once} texts at once; try again later, or another one",
                    retry_after=round(self.queue.retry_after, 1),
                )
            began = now()
            yield
        finally:
            self.queue.leave(queued, 0.0 if began is None else now() - began)

    async def _make(
        self,
        channel: Channel,
        reader: _Reader,
        request: OpenGeneration,
        prompt: Prompt,
        options: GenerationOptions,
    ) -> None:
        began = asyncio.get_running_loop().time()
        encoded = await self.model.encode(prompt)
        check_length(len(encoded.tokens), self.limits)
        self.counters["texts"] += 1
        await self._send(channel, GenerationStarted(self.model.info.fingerprint, len(encoded.tokens)))
        had = sent = len(request.so_far)
        adapter = request.adapter or None
        async with self.model.generate(
            encoded, adapter=adapter, so_far=request.so_far, namespace=channel.remote, **options
        ) as generation:
            try:
                async for text in generation:
                    tokens = tuple(generation.tokens[sent:])
                    await self._send(channel, TextPiece(text, tokens))
                    sent += len(tokens)
                    self.counters["text_tokens"] += len(tokens)
                    await self._taken(reader, sent - had - AHEAD)
                rest = tuple(generation.tokens[sent:])
            finally:
                self.speculation.add(generation.speculation)
        ended = GenerationEnded(
            generation.finish_reason or "length",
            rest,
            len(generation.tokens),
            asyncio.get_running_loop().time() - began,
            tuple(map(str, generation.numerics)),
        )
        await self._send(channel, ended)
        logger.info(
            "text for %s: %d tokens in %.1f s (%s)",
            short(channel.remote),
            len(generation.tokens) - had,
            ended.seconds,
            ended.reason,
        )

    async def _send(self, channel: Channel, record: object) -> None:
        async with self._deadline():
            await channel.send(record)

    async def _taken(self, reader: _Reader, tokens: int) -> None:
        """Wait until the client has taken so many."""
        async with self._deadline():
            await reader.taken(tokens)

    def _deadline(self) -> Deadline:
        seconds = self.limits.reader_timeout
        return deadline_after(seconds, f"the client took nothing of its text for {seconds:g} s")


class _Reader:
    """What the client says while its text is made: how far it is, and that it has enough."""

    def __init__(self, channel: Channel, lifetime: asyncio.Timeout) -> None:
        self.end: SwarmError | None = None
        self._channel = channel
        self._lifetime = lifetime
        self._tokens = 0
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Take what it says, to its end, with which the text ends, too."""
        try:
            while True:
                message = await self._channel.receive()
                self._tokens = max(self._tokens, message.record.tokens)
                self._news.set()
        except SwarmError as exc:
            self.end = exc
            if not self._lifetime.expired():
                self._lifetime.reschedule(asyncio.get_running_loop().time())

    async def taken(self, tokens: int) -> None:
        while self._tokens < tokens:
            self._news.clear()
            await self._news.wait()
