"""A session of a remote model: token ids in, logits out; the attention caches stay on the servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import torch

from swarmcore.client.generation.compute import ModelCompute
from swarmcore.client.generation.session_api import RemoteSession, Reply, SessionOpener
from swarmcore.errors import InputError, SessionLostError, SwarmError
from swarmcore.executor.torch.wire_tensors import to_wire
from swarmcore.prompts import check_tokens, checked_ids
from swarmcore.routing.chain import Chain
from swarmcore.session.steps import SentStep
from swarmcore.types import Numerics
from swarmcore.wire.tensors import Tensor

NAMING_TIMEOUT = 1.0
"""Seconds that the end of a session takes longer, at most, to say what it consisted of."""


class ModelSession:
    """Some sequences whose attention caches the swarm keeps, and their tokens.

    Made by `RemoteModel.session`; entering it opens it, leaving it frees the caches. One thing at a time: a
    `step` must have returned, a generation ended, before the next one begins. With `send` and `receive`
    several steps are under way, one behind the other, and `recall` gives up those that are of no use.
    """

    def __init__(
        self,
        compute: ModelCompute,
        open_remote: SessionOpener,
        *,
        sequences: int,
        max_tokens: int,
        on_close: Callable[[ModelSession], None],
        soft_prompt: torch.Tensor | None = None,
        prefix_tokens: int = 0,
        namespace: str = "",
    ) -> None:
        """``soft_prompt``, ``[tokens, hidden size]``, goes before the tokens of every sequence; so do the
        ``prefix_tokens`` positions of an adapter, on the servers. ``namespace`` is whose earlier sessions it
        may begin with.
        """
        if sequences < 1:
            raise InputError(f"sequences must be 1 or more; got {sequences}")
        self.sequences = sequences
        self._compute = compute
        self._open_remote = open_remote
        self._max_tokens = max_tokens
        self._on_close = on_close
        self._soft_prompt = soft_prompt
        self._prompt_rows = 0 if soft_prompt is None else soft_prompt.shape[0]
        self._prefix_tokens = prefix_tokens
        self.namespace = namespace
        self._begun = False
        self._prompts: list[list[int]] = []
        """The tokens that its first step is expected to bring, as far as that is known."""
        self._remote: RemoteSession | None = None
        self._tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.cached: tuple[int, ...] = (0,) * sequences
        """How many of the tokens of the latest step, of each sequence, servers had computed before."""
        self._in_use = False
        self._closed = False

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each sequence that are in the remote caches."""
        return tuple(map(tuple, self._tokens))

    @property
    def positions(self) -> tuple[int, ...]:
        """How many tokens of each sequence are in the remote caches."""
        return tuple(map(len, self._tokens))

    @property
    def max_in_flight(self) -> int:
        """Steps that may be under way at a time: 1 where a server cannot be told to drop one."""
        return self._remote.max_in_flight if self._remote is not None else 1

    @property
    def chain(self) -> Chain:
        """The servers that the session passes through now; none before it is open."""
        return self._remote.chain if self._remote is not None else Chain(())

    @property
    def numerics(self) -> tuple[Numerics, ...]:
        """How the servers of the session have computed so far, each way once; see `Generation.numerics`."""
        return self._remote.numerics if self._remote is not None else ()

    @property
    def offset(self) -> int:
        """The position of the first token: how many a soft prompt and an adapter's prefix take before it."""
        return self._prompt_rows + self._prefix_tokens

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"pos {','.join(map(str, self.positions))}"
        return f"<ModelSession {self.chain} · {state}>"

    async def open(self, prompts: Sequence[Sequence[int]] = ()) -> Self:
        """Open it on the servers; `step` does not. Harmless when it is open.

        ``prompts`` are the tokens of each sequence that the first step will bring, where they are known: what
        the servers have of them from earlier sessions is not computed again.

        Raise `MissingBlocksError` when no servers hold some of the blocks, `CacheFullError` when they have no
        room.
        """
        if self._closed:
            raise SessionLostError("the session was closed; make another one")
        if self._remote is None:
            room = self._max_tokens + self._prompt_rows
            # Rows of a soft prompt have no name.
            self._prompts = [] if self._prompt_rows else [list(each) for each in prompts]
            remote = await self._open_remote(
                sequences=self.sequences,
                max_tokens=room,
                prompts=() if self._prompt_rows else self._prompts or [()] * self.sequences,
                namespace=self.namespace,
            )
            try:
                await self._send_soft_prompt(remote)
            except BaseException:
                await remote.close()
                raise
            self._remote = remote
        return self

    async def _send_soft_prompt(self, remote: RemoteSession) -> None:
        if self._soft_prompt is None:
            return
        positions = range(self._prefix_tokens, self.offset)
        rows = await self._compute.run(self._compute.parts.embed_vectors, self._soft_prompt, positions)
        many = self.sequences
        await remote.step(to_wire("hidden", rows.repeat(many, 1)), [self._prompt_rows] * many, reply="last")

    async def close(self) -> None:
        """Free the caches on the servers. Harmless when repeated."""
        self._closed = True
        self._on_close(self)
        remote, self._remote = self._remote, None
        if remote is None:
            return
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(NAMING_TIMEOUT):
                    await remote.name_pages(self._tokens)
        finally:
            await remote.close()

    async def name_pages(self) -> None:
        """Have what the session consists of by now found by later ones, also if it is never closed.

        Closing it does so, too.
        """
        if self._remote is not None:
            await self._remote.name_pages(self._tokens)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def step(
        self, ids: Sequence[Sequence[int]], *, sources: Sequence[int] = (), reply: Reply = "last"
    ) -> torch.Tensor:
        """Append new tokens to each sequence and return what the model predicts after the last of them.

        ``ids`` has one list, or row of an array, for each sequence; an empty one leaves its sequence alone.
        With ``sources``, for beam search, sequence ``i`` first becomes a copy of sequence ``sources[i]``. The
        result is float32 ``[rows, vocabulary]``, a row for each sequence that got tokens, in order; with
        ``reply="all"`` a row for each of the new tokens.

        Raise `InputError` for ids outside the vocabulary, sources that are not sequences, and sequences
        longer than the model can take; then nothing has changed. When the remote fails, the session stands
        where it was, and may be of no more use, as the error says.
        """
        if sources and (
            len(sources) != self.sequences or not all(0 <= source < self.sequences for source in sources)
        ):
            raise InputError(
                f"sources {list(sources)} do not name one of {self.sequences} sequences for each"
            )
        tokens = [list(self._tokens[source]) for source in sources] or self._tokens
        ids = [checked_ids(new) for new in ids]
        self._check(ids, tokens)
        with self.exclusive():
            hidden = await self._compute.embed(*self._flat(ids, tokens))
            return await self._compute.logits(
                await self.step_embedded(ids, hidden, sources=sources, reply=reply)
            )

    async def send(self, ids: Sequence[Sequence[int]], *, reply: Reply = "all") -> SentStep:
        """Append new tokens to each sequence, behind the steps that are under way; see `receive`.

        Wait while `max_in_flight` of them are. Raise as `step` for what cannot be sent.
        """
        ids = [checked_ids(new) for new in ids]
        self._check(ids, self._tokens)
        with self.exclusive():
            return await self.send_embedded(ids, await self.embed(ids), reply=reply)

    async def receive(self, step: SentStep) -> torch.Tensor:
        """What the model predicts after the tokens that were sent, float32 ``[rows, vocabulary]``.

        After each of them, or with ``reply="last"`` after the last of each sequence. When the remote fails,
        the session stands where it was before the step, and steps sent behind it have failed as well.
        """
        return await self._compute.logits(await self.receive_embedded(step))

    async def recall(self, step: SentStep) -> None:
        """Give up a step that was not received, and all that were sent behind it.

        Their tokens are no longer part of the sequences; servers drop what they have not computed.
        """
        if self._remote is not None:
            await self._remote.recall(step)
            self._forget_tokens()

    def rollback(self, positions: int | Sequence[int]) -> None:
        """Forget the tokens of each sequence from its position on: one for all, or one for each.

        The servers forget them with the next step. Raise `InputError` for a position beyond what is cached.
        """
        wanted = [positions] * self.sequences if isinstance(positions, int) else list(positions)
        if len(wanted) != self.sequences or not all(
            0 <= new <= old for new, old in zip(wanted, self.positions, strict=True)
        ):
            raise InputError(f"cannot roll back to {positions}: the sequences have {self.positions} tokens")
        for tokens, length in zip(self._tokens, wanted, strict=True):
            del tokens[length:]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the session to oneself. Raise `InputError` when a step or a generation is under way in it."""
        if self._in_use:
            raise InputError(
                "a step or a generation of this session is still under way; wait for its end, or aclose() it"
            )
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False

    def reuse_prefix(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Roll back to what the sequences have in common with ``prompts``; return the tokens still to come.

        At least one for each, since a prediction is made of a token that is sent.
        """
        rest = []
        for tokens, prompt in zip(self._tokens, prompts, strict=True):
            common = 0
            for cached, wanted in zip(tokens, prompt[:-1], strict=False):
                if cached != wanted:
                    break
                common += 1
            del tokens[common:]
            rest.append(list(prompt[common:]))
        return rest

    async def embed(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embed the tokens that come next in each sequence, all in one tensor ``[tokens, hidden size]``."""
        return await self._compute.embed(*self._flat(ids, self._tokens))

    async def step_embedded(
        self,
        ids: Sequence[Sequence[int]],
        hidden: torch.Tensor,
        *,
        sources: Sequence[int] = (),
        reply: Reply = "last",
    ) -> Tensor:
        """Send the embedded tokens ``ids`` through the blocks; return a row for each sequence with some."""
        remote = await self._opened_for(ids, sources)
        tokens = [list(self._tokens[source]) for source in sources] or self._tokens
        output = await remote.step(
            to_wire("hidden", hidden),
            [len(new) for new in ids],
            starts=[self._prompt_rows + len(cached) for cached in tokens],
            sources=sources,
            reply=reply,
        )
        self._came_back(remote)
        self._tokens = tokens
        for sequence, new in zip(tokens, ids, strict=True):
            sequence.extend(new)
        return output

    async def send_embedded(
        self, ids: Sequence[Sequence[int]], hidden: torch.Tensor, *, reply: Reply = "all"
    ) -> SentStep:
        """As `step_embedded`, behind the steps that are under way; the tokens are part of the sequences."""
        remote = await self._opened_for(ids)
        starts = [self._prompt_rows + len(cached) for cached in self._tokens]
        step = await remote.send(
            to_wire("hidden", hidden), [len(new) for new in ids], starts=starts, reply=reply
        )
        for sequence, new in zip(self._tokens, ids, strict=True):
            sequence.extend(new)
        return step

    async def receive_embedded(self, step: SentStep) -> Tensor:
        """The rows that come of a step that was sent, as it asked for them."""
        remote = self._checked_open()
        try:
            output = await remote.receive(step)
        except SwarmError:
            self._forget_tokens()
            raise
        self._came_back(remote)
        return output

    def _came_back(self, remote: RemoteSession) -> None:
        self.cached = (0,) * self.sequences if self._begun else remote.cached
        self._begun = True

    def _forget_tokens(self) -> None:
        """Those of steps that were given up."""
        if self._remote is not None:
            for tokens, position in zip(self._tokens, self._remote.positions, strict=True):
                del tokens[max(position - self._prompt_rows, 0) :]

    def _checked_open(self) -> RemoteSession:
        if self._remote is None:
            raise SessionLostError(
                "the session is not open; use it as: async with model.session() as session"
            )
        return self._remote

    async def _opened_for(self, ids: Sequence[Sequence[int]], sources: Sequence[int] = ()) -> RemoteSession:
        """The remote session, which knows what its first step brings."""
        remote = self._checked_open()
        first = not self._begun and not any(self._tokens)
        if first and self._prompts and (sources or [list(new) for new in ids] != self._prompts):
            # It was opened for a prompt that was given up, and its pages have the names of that.
            self._remote = None
            await remote.close()
            await self.open(() if sources else ids)
            remote = self._checked_open()
        return remote

    def _check(self, ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> None:
        if len(ids) != self.sequences or not any(ids):
            raise InputError(
                f"a step needs a list of token ids for each of the {self.sequences} sequences, and at least "
                f"one token in all"
            )
        parts = self._compute.parts
        for new, position in zip(ids, map(len, tokens), strict=True):
            check_tokens(new, parts.vocab_size)
            end = self.offset + position + len(new)
            if parts.max_positions is not None and end > parts.max_positions:
                raise InputError(f"{end} tokens are more than the model takes: {parts.max_positions}")

    def _flat(
        self, ids: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int]]:
        """New tokens of all sequences, and the position of each, after the ``tokens`` that are there."""
        positions = [
            self.offset + len(before) + index
            for before, new in zip(tokens, ids, strict=True)
            for index in range(len(new))
        ]
        return [token for new in ids for token in new], positions
