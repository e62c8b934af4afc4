"""The cache of a remote model, as Transformers' `generate` handles it: the keys and values are elsewhere."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from transformers import Cache

from swarmcore.client.generation.session_api import RemoteSession, SessionOpener
from swarmcore.errors import InputError, UnavailableError
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.loop_thread import LoopThread

logger = logging.getLogger(__name__)

Reply = Literal["all", "last"]

PADDING = -1
"""What stands for the position of a column that is padding."""


class RemoteCache(Cache):  # type: ignore[misc]
    """Stands for the attention caches that servers keep for some sequences.

    Counts columns as Transformers does, padding included, while only what is no padding is ever sent. What
    was sent into the first block is kept here as well (as much as the session's own journal): so it can be
    copied with `copy.deepcopy`, and its sequences repeated, in which case another session is opened at the
    next step and everything is sent again.

    The session is opened at the first step. It is closed by `close`, and when the cache is dropped.
    """

    def __init__(self, loop: LoopThread, open_session: SessionOpener, *, expected_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.expected_tokens = expected_tokens
        """What each sequence is expected to grow to; no limit."""
        self.adapter: object = None
        """Stands for the adapter whose keys and values it has."""
        self._loop = loop
        self._open_session = open_session
        self._positions = torch.empty(0, 0, dtype=torch.long)
        self._sent: list[list[torch.Tensor]] = []
        self._session: RemoteSession | None = None
        self._sources: list[int] = []
        self._dropped: weakref.finalize[..., Self] | None = None

    def __repr__(self) -> str:
        state = self._session or "no session"
        return f"<RemoteCache {len(self._sent)} x {self.get_seq_length()} · {state}>"

    @property
    def session(self) -> RemoteSession | None:
        """The session that is open for it now."""
        return self._session

    @property
    def positions(self) -> torch.Tensor:
        """The position of each column of each sequence ``[sequences, columns]``, -1 where it is padding."""
        return self._positions

    def step(self, hidden: torch.Tensor, positions: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        """Send new columns ``[sequences, columns, hidden size]`` through all blocks; return the same shape.

        ``positions`` are -1 where a column is padding, and zeros come out there; with ``last_only``
        everywhere but at the last column of each sequence that is no padding. Raise `InputError` for another
        number of sequences than before, and what opening and stepping a session raise; the cache is then as
        it was, and the step may be tried again.
        """
        self.check_batch(len(hidden))
        if not self.get_seq_length():
            self._sent = [[] for _ in hidden]
            self._positions = positions.new_empty(len(hidden), 0, device="cpu")
            if self._session is not None and self._session.sequences < len(hidden):
                self.close()
        positions = positions.cpu()
        real = positions >= 0
        outputs = torch.zeros_like(hidden)
        if real.any():
            chunks = torch.split(hidden.detach().cpu()[real], real.sum(1).tolist())
            rows = self._loop.run(self._send(chunks, "last" if last_only else "all"))
            outputs[_last_of_each(real) if last_only else real] = rows.to(outputs)
            for sent, chunk in zip(self._sent, chunks, strict=True):
                if len(chunk):
                    sent.append(chunk)
        self._positions = torch.cat([self._positions, positions], dim=1)
        return outputs

    def check_batch(self, sequences: int) -> None:
        """Raise `InputError` for another number of sequences than are cached."""
        if self.get_seq_length() and sequences != len(self._sent):
            raise InputError(f"the cache has {len(self._sent)} sequences, and the step {sequences}")

    def inputs(self) -> torch.Tensor:
        """What went into the first block ``[sequences, columns, hidden size]``, zeros where padding is."""
        rows = [row for chunks in self._sent for row in chunks]
        packed = torch.cat(rows)
        inputs = packed.new_zeros(*self._positions.shape, packed.shape[-1])
        inputs[self._positions >= 0] = packed
        return inputs

    def close(self) -> None:
        """Free the caches on the servers. Harmless when repeated; a later step opens another session."""
        if (session := self._forget_session()) is not None:
            self._loop.run(session.close())

    # --- what generate asks of a cache -------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return len(self._sent) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._positions.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before Transformers 5.10

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove as many columns as the negative number says; a positive one is the length to keep."""
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if keep < 0:
            raise InputError(f"cannot remove {-tokens_to_remove} columns of {length}")
        gone = (self._positions[:, keep:] >= 0).sum(1).tolist()
        self._positions = self._positions[:, :keep]
        self._sent = [_without_last(chunks, count) for chunks, count in zip(self._sent, gone, strict=True)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self._sent))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(len(self._sent)) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget everything, and free the caches on the servers."""
        self.close()
        self._sent = []
        self._positions = torch.empty(0, 0, dtype=torch.long)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self._loop, self._open_session, expected_tokens=self.expected_tokens)
        copied.adapter = self.adapter
        copied._positions = self._positions.clone()
        copied._sent = [list(chunks) for chunks in self._sent]
        return copied

    # --- the session -------------------------------------------------------------------------------------

    @property
    def _starts(self) -> list[int]:
        starts: list[int] = (self._positions >= 0).sum(1).tolist()
        return starts

    def _select(self, indices: Sequence[int]) -> None:
        """Make sequence ``i`` a copy of sequence ``indices[i]``, and drop the sequences beyond."""
        if list(indices) == list(range(len(self._sent))):
            return
        self._sent = [list(self._sent[i]) for i in indices]
        self._positions = self._positions[list(indices)]
        if self._session is None:
            return
        if len(indices) > self._session.sequences:
            self.close()
            return
        # The session keeps the sequences that are not used any more, empty, for when they are used again.
        sources = self._sources or list(range(self._session.sequences))
        unused = range(len(indices), len(sources))
        self._sources = [sources[i] for i in indices] + [sources[i] for i in unused]

    async def _send(self, chunks: Sequence[torch.Tensor], reply: Reply) -> torch.Tensor:
        if self._session is None:
            await self._open(chunks)
        session = self._session
        assert session is not None
        try:
            return await self._step(session, chunks, self._starts, reply)
        except UnavailableError:
            self._forget_session()
            await session.close()
            raise

    async def _open(self, chunks: Sequence[torch.Tensor]) -> None:
        """Open a session with room for these, and send it what was sent before."""
        starts = self._starts
        expected = max(self.expected_tokens, *map(int.__add__, starts, map(len, chunks)))
        session = await self._open_session(sequences=len(chunks), max_tokens=expected)
        try:
            if any(starts):
                before = [torch.cat(sent) if sent else chunks[i][:0] for i, sent in enumerate(self._sent)]
                await self._step(session, before, [0] * len(before), "last")
        except BaseException:
            self._sources = []
            await session.close()
            raise
        self._session = session
        self._dropped = weakref.finalize(self, _close_soon, self._loop.loop, session)
        self._dropped.atexit = False  # the swarm is closed then

    async def _step(
        self, session: RemoteSession, chunks: Sequence[torch.Tensor], starts: Sequence[int], reply: Reply
    ) -> torch.Tensor:
        """Send rows of each sequence; return what comes back, one sequence after the other.

        Sequences that begin alike, as beams and samples do, are sent once, and copied on the servers.
        """
        whole = list(range(session.sequences))
        firsts = _first_equals(chunks) if not any(starts) else whole[: len(chunks)]
        sent = [chunk if firsts[i] == i else chunk[:0] for i, chunk in enumerate(chunks)]
        unused = [0] * (session.sequences - len(chunks))
        output = await session.step(
            to_wire("hidden", torch.cat(sent)),
            [*map(len, sent), *unused],
            starts=[*starts, *unused],
            sources=self._sources,
            reply=reply,
        )
        sources = firsts + whole[len(firsts) :]
        self._sources = [] if sources == whole else sources
        counts = [min(len(chunk), 1) if reply == "last" else len(chunk) for chunk in sent]
        pieces = torch.split(to_torch(output), counts)
        return torch.cat([pieces[first] for first in firsts])

    def _forget_session(self) -> RemoteSession | None:
        session, self._session = self._session, None
        self._sources = []
        if self._dropped is not None:
            self._dropped.detach()
        return session


def _first_equals(chunks: Sequence[torch.Tensor]) -> list[int]:
    """For each, the index of the first one that is equal to it."""
    firsts: list[int] = []
    for i, chunk in enumerate(chunks):
        firsts.append(next((j for j in dict.fromkeys(firsts) if torch.equal(chunks[j], chunk)), i))
    return firsts


def _last_of_each(real: torch.Tensor) -> torch.Tensor:
    """Of the columns that are no padding, the last one of each row, as a mask."""
    from_the_end = real.flip(1).long().cumsum(1).flip(1)
    return real & (from_the_end == 1)


def _without_last(chunks: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Chunks of rows without the last ``count`` rows."""
    chunks = list(chunks)
    while count and count >= len(chunks[-1]):
        count -= len(chunks.pop())
    if count:
        chunks[-1] = chunks[-1][:-count]
    return chunks


_closing: set[asyncio.Task[None]] = set()
"""Sessions of dropped caches on their way out; the event loop itself holds its tasks only weakly."""


def _close_soon(loop: asyncio.AbstractEventLoop, session: RemoteSession) -> None:
    # Garbage is collected in any thread, even that of the loop: nothing may be waited for here.
    if not loop.is_closed():
        loop.call_soon_threadsafe(_start_closing, session)


def _start_closing(session: RemoteSession) -> None:
    task = asyncio.get_running_loop().create_task(session.close(), name="close a dropped session")
    _closing.add(task)
    task.add_done_callback(_closed)


def _closed(task: asyncio.Task[None]) -> None:
    _closing.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("a session did not close in good order: %s", error)
