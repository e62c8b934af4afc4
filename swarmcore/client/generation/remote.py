"""Text for a client without torch: a generation server makes it, and another one goes on when that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from random import Random
from typing import Any, cast, get_args

import attrs

from swarmcore.client.generation.stream import FinishReason, GeneratedText, TextStream
from swarmcore.client.served_models import called
from swarmcore.errors import (
    BusyError,
    ConnectionLostError,
    DeadlineExceededError,
    InputError,
    MissingHeadError,
    PeerUnreachableError,
    ProtocolError,
    RemoteFaultError,
    StreamClosedError,
    SwarmError,
    UnavailableError,
    UnknownTransportError,
)
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.routing.health import PeerHealth
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.rpc.ping import probe
from swarmcore.sources import is_called
from swarmcore.tasks import running
from swarmcore.types import Address, ModelInfo, Numerics, PeerId, ServerInfo, short
from swarmcore.wire.generate import (
    AHEAD,
    GenerationEnded,
    GenerationStarted,
    OpenGeneration,
    TextPiece,
    TokensTaken,
)
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import GENERATE_PROTOCOL, PING_METHOD

logger = logging.getLogger(__name__)


class GenerationServerChoice:
    """Picks generation servers of one model, any of them as soon as another; those that leave or are banned
    last.

    ``model`` is a name, a source or a fingerprint, or empty for the only one there is. From the first pick on
    it is the one with that fingerprint. ``admits`` says which peers may be used at all.
    """

    def __init__(
        self, model: str, rng: Random, *, admits: Callable[[PeerId], bool] = lambda peer: True
    ) -> None:
        self.model = model
        self._rng = rng
        self._admits = admits

    def pick(
        self, view: SwarmView, *, banned: Collection[PeerId] = (), tried: Collection[PeerId] = ()
    ) -> ServerInfo | None:
        """A generation server that is not among ``tried``; None when there is none.

        Raise `InputError` when the model is not named and there are several, or the name stands for several.
        """
        offers = [
            (server, model)
            for server in sorted(view, key=lambda server: server.peer)
            for model in server.heads
            if (not self.model or is_called(model, self.model)) and self._admits(server.peer)
        ]
        found = {model.fingerprint: model for _, model in offers}
        if len(found) > 1:
            raise InputError(
                f"generation servers of this swarm make texts of {', '.join(map(called, found.values()))}; "
                f"say with model which, by name, source or fingerprint"
            )
        able = [server for server, _ in offers if server.peer not in tried]
        if not able:
            return None
        (self.model,) = found
        self._rng.shuffle(able)
        return min(able, key=lambda server: (server.peer in banned, server.state == "draining"))

    def offer(self, view: SwarmView) -> ModelInfo:
        """The model of which somebody makes texts. Raise as `pick`, and `MissingHeadError` if nobody does."""
        server = self.pick(view)
        if server is None:
            raise self.missing(view)
        return next(model for model in server.heads if model.fingerprint == self.model)

    def missing(self, view: SwarmView) -> MissingHeadError:
        """That there is none to pick, and what to do about it."""
        of = f" of {self.model}" if self.model else ""
        offered = ", ".join(called(model) for model, _ in view.heads())
        if offered:
            return MissingHeadError(
                f"no peer that this client may use makes texts{of} for clients without a part of the model; "
                f"in this swarm they are made of {offered}"
            )
        return MissingHeadError(
            f"no peer of this swarm makes texts{of} for clients without a part of the model; start one: "
            f"swarmcore serve --serve-head, or swarmcore bootstrap --serve-head --model MODEL"
        )


PATIENCE = 60.0
"""Seconds for which a text that broke off waits for a generation server that goes on with it."""

ASK_AFTER = 10.0
"""Seconds without a word from a generation server after which it is asked whether it lives, again and again:
the text may wait for its turn, for servers that take over from others, or for a long prompt on slow ones."""

LONGEST_SILENCE = 3600.0
"""Seconds without a piece of the text after which a generation server counts as lost that lives."""

MOST_CHARACTERS = 1024
"""Characters of text for each token: a generation server that sends more is lying, no tokenizer has longer
ones."""

MOST_EMPTY_PIECES = 64
"""Pieces of one text that bring no token: some hold the end of what was certain only later."""

MOST_NUMERICS = 16
"""Ways of computing that are told of one text."""

PAUSE = 1.0
"""Seconds between two looks for a generation server that goes on, unless those that are there say when to
come."""


@attrs.define(eq=False)
class RemoteRun:
    """How a generation goes, kept up to date while it runs, and what it is made with."""

    node: Node
    registry: Registry
    health: PeerHealth
    choice: GenerationServerChoice
    patience: float
    text: GeneratedText = attrs.field(factory=GeneratedText)
    server: PeerId | None = None
    failovers: int = 0
    characters: int = 0
    """Of the text so far."""
    empty_pieces: int = 0

    async def pieces(self, request: OpenGeneration) -> AsyncGenerator[tuple[int, str], None]:
        """The pieces of a text, by one generation server after the other until one has made it whole."""
        now = asyncio.get_running_loop().time
        tried: set[PeerId] = set()
        errors: list[SwarmError] = []
        give_up = None
        while self.text.finish_reason is None:
            banned = self.health.banned(now())
            server = self.choice.pick(self.registry.view(), banned=banned, tried=tried)
            if server is None:
                if not self.text.tokens or (give_up is not None and now() >= give_up):
                    raise self._why_none(errors)
                await self._pause(errors, give_up)
                tried.clear()
                continue
            before = len(self.text.tokens)
            self.failovers += before > 0
            try:
                # Passing on what another generator makes: it is to be closed when this one is.
                async with aclosing(self._from_server(server, request)) as pieces:
                    async for piece in pieces:
                        yield 0, piece
            except StreamClosedError:
                raise  # the swarm was closed on this side
            except (UnavailableError, BusyError, UnknownTransportError) as exc:
                if len(self.text.tokens) > before:
                    tried, errors, give_up = set(), [], None
                self._blame(server.peer, exc)
                tried.add(server.peer)
                errors.append(exc)
                give_up = now() + self.patience if give_up is None else give_up

    async def _from_server(self, server: ServerInfo, request: OpenGeneration) -> AsyncGenerator[str, None]:
        """Let ``server`` go on with the text, to its end if it lives that long."""
        self.server = server.peer
        opening = attrs.evolve(request, model=self.choice.model, so_far=tuple(self.text.tokens))
        addresses = server.dialable
        async with await self.node.open(addresses, GENERATE_PROTOCOL, opening) as channel:
            taken = reported = 0
            started = False
            while True:
                record = await _next(self.node, addresses, channel)
                if isinstance(record, GenerationStarted):
                    if started:
                        raise ProtocolError("the generation server began the text twice")
                    started = True
                    self.text.prompt_tokens = record.prompt_tokens
                elif isinstance(record, TextPiece):
                    whole = self._take(record, request.max_new_tokens)
                    taken += len(record.tokens)
                    yield record.text
                    if not whole:
                        why = f"it sent more than the {request.max_new_tokens} tokens that were asked for"
                        logger.warning(
                            "the text of generation server %s was cut: %s", short(server.peer), why
                        )
                        self.health.failed(server.peer, asyncio.get_running_loop().time(), why)
                        self.text.finish_reason = "length"
                        return
                    if taken - reported >= AHEAD // 4:
                        with suppress(StreamClosedError):  # what comes next says why it is closed
                            await channel.send(TokensTaken(taken))
                        reported = taken
                else:
                    self.text.numerics = _numerics(record)
                    self.text.finish_reason = _reason(record)
                    self.text.tokens += record.tokens[: request.max_new_tokens - len(self.text.tokens)]
                    self.health.succeeded(server.peer)
                    return

    def _take(self, piece: TextPiece, most: int) -> bool:
        """Take in a piece; False when it has more tokens than were asked for, of which it then is the last.

        Raise `ProtocolError` when its text is too long for its tokens, or too many pieces have none.
        """
        room = most - len(self.text.tokens)
        characters = self.characters + len(piece.text)
        empty = self.empty_pieces + (not piece.tokens)
        tokens = min(len(self.text.tokens) + len(piece.tokens), most)
        if characters > MOST_CHARACTERS * (tokens + 1) or empty > MOST_EMPTY_PIECES:
            raise ProtocolError(
                f"the generation server sent {characters} characters of text, {empty} pieces of it without a "
                f"token, for {tokens} tokens"
            )
        self.characters, self.empty_pieces = characters, empty
        self.text.tokens += piece.tokens[:room]
        return len(piece.tokens) <= room

    def _blame(self, peer: PeerId, error: SwarmError) -> None:
        """Avoid a generation server that fell silent or failed, not one that said why it cannot."""
        here = error.origin is None and not isinstance(error, UnknownTransportError)
        if here or isinstance(error, RemoteFaultError | ProtocolError):
            self.health.failed(peer, asyncio.get_running_loop().time(), error.message)
        if here and isinstance(error, ConnectionLostError | PeerUnreachableError | DeadlineExceededError):
            self.registry.suspect(peer)

    def _why_none(self, errors: list[SwarmError]) -> SwarmError:
        """What the caller can best act on: a busy peer says when to come back, a lost one nothing."""
        if not errors:
            return self.choice.missing(self.registry.view())
        busy: list[SwarmError] = [error for error in errors if isinstance(error, BusyError)]
        return (busy or errors)[-1]

    async def _pause(self, errors: list[SwarmError], give_up: float | None) -> None:
        """Wait for a generation server that is not known yet, or until one that was busy may have time."""
        loop = asyncio.get_running_loop()
        waits = [
            wait for error in errors if isinstance(wait := error.details.get("retry_after"), int | float)
        ]
        seconds = min([max(PAUSE, wait) for wait in waits], default=PAUSE)
        if give_up is not None:
            seconds = min(seconds, max(0.0, give_up - loop.time()))
        try:
            async with asyncio.timeout(seconds):
                async for change in self.registry.changes():
                    if change.info.heads and change.kind != "left":
                        return
                await asyncio.sleep(seconds)  # the registry is closed
        except TimeoutError:
            return


class RemoteGeneration(TextStream):
    """Text that a generation server makes: ``async for piece in swarm.generate(…)``, or awaited as a whole.

    It starts with the first piece that is asked for, and goes at most `AHEAD` tokens ahead of the pieces that
    are taken. Leaving the loop early ends it; so does `aclose`.
    """

    def __init__(self, run: RemoteRun, request: OpenGeneration) -> None:
        super().__init__(run.text, run.pieces(request))
        self._run = run

    @property
    def server(self) -> PeerId | None:
        """The generation server that makes it now; None before it starts."""
        return self._run.server

    @property
    def failovers(self) -> int:
        """How often another generation server has gone on with it."""
        return self._run.failovers

    @property
    def _made_by(self) -> str:
        return short(self.server) if self.server is not None else "no generation server"


async def _next(node: Node, addresses: Sequence[Address], channel: Channel) -> Any:
    """What the generation server says next, for as long as it lives."""
    try:
        async with running(channel.receive(), "piece of a text") as receiving:
            for _ in range(int(LONGEST_SILENCE / ASK_AFTER)):
                done, _ = await asyncio.wait([receiving], timeout=ASK_AFTER)
                if done:
                    return receiving.result().record
                await _check_alive(node, addresses)
    except StreamClosedError as exc:
        raise ConnectionLostError(
            f"generation server {short(channel.remote)} ended before the text did"
        ) from exc
    raise DeadlineExceededError(
        f"generation server {short(channel.remote)} made nothing of the text for {LONGEST_SILENCE:.0f} s"
    )


async def _check_alive(node: Node, addresses: Sequence[Address]) -> None:
    """Raise `DeadlineExceededError` when a generation server does not answer."""
    try:
        await probe(node, addresses, PING_METHOD, Ping(), least=1.0)
    except DeadlineExceededError as exc:
        if exc.origin is None:
            raise
    except SwarmError as exc:
        # Its stream still stands: whether a second one can be opened is another matter.
        logger.debug("%s could not be asked whether it lives: %s", short(addresses[0].peer), exc)


def _numerics(record: GenerationEnded) -> tuple[Numerics, ...]:
    try:
        return tuple(map(Numerics.parse, record.numerics[:MOST_NUMERICS]))
    except InputError as exc:
        raise ProtocolError(f"a text was made in an unknown way: {exc.message}") from exc


def _reason(record: GenerationEnded) -> FinishReason:
    if record.reason not in get_args(FinishReason):
        raise ProtocolError(f"a text ended for an unknown reason: {record.reason[:40]!r}")
    return cast(FinishReason, record.reason)
