"""A causal language model that runs whole in this process, for several sequences that go on and roll back."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch

from swarmcore.errors import SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire

_PREFILL = 512
"""Most tokens of one pass."""
_ROOM = 256
"""Tokens by which the room of a sequence grows."""
CACHE_BYTES = 2**30
"""Attention caches of all sequences together."""


class Parts(Protocol):
    """What comes before and after a model's blocks."""

    vocab_size: int
    max_positions: int | None

    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """``[tokens, hidden size]``."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, vocabulary]`` of ``[rows, hidden size]`` that come out of the last block."""


class CachedText:
    """A sequence of a `LocalDecoder`, and which of its tokens are in the attention cache."""

    def __init__(self, sequence: SequenceId) -> None:
        self.sequence = sequence
        self.tokens: list[int] = []
        self.room = 0
        self._sure = 0
        """So many of its tokens are certain: they need not be compared again."""

    def common(self, ids: Sequence[int], certain: int) -> int:
        """How many of its tokens ``ids`` begins with, of which the first ``certain`` never change."""
        same, most = self._sure, min(len(self.tokens), len(ids))
        while same < most and self.tokens[same] == ids[same]:
            same += 1
        self._sure = min(same, certain)
        return same

    def clear(self) -> None:
        self.tokens, self.room, self._sure = [], 0, 0


class LocalDecoder:
    """Predicts what comes after several texts at a time.

    Their attention caches are kept as far as there is room for them: the text that was used least lately has
    to be taken in again. For use by one thread at a time, which runs no event loop.
    """

    def __init__(
        self,
        parts: Parts,
        executor: BlockExecutor,
        *,
        cache_bytes: int = CACHE_BYTES,
        threads: int | None = None,
    ) -> None:
        """``executor`` holds all blocks; it is closed with this. ``threads`` are for what comes after it."""
        self.parts = parts
        self._threads = threads
        self._executor = executor
        self.most_tokens = cache_bytes // executor.cache_bytes_per_token
        self.most_texts = executor.max_sequences or 2**31
        self._numbers = itertools.count()
        self._texts: OrderedDict[SequenceId, CachedText] = OrderedDict()
        """Those that have a cache, the one used least lately first."""
        self._loop = asyncio.new_event_loop()
        self.computed = 0
        """Tokens that went through the blocks so far."""

    def __repr__(self) -> str:
        return f"<LocalDecoder {self._executor!r} · {len(self._texts)} texts · {self.cached_tokens} tokens>"

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it can take."""
        limit = self.parts.max_positions
        return self.most_tokens if limit is None else min(limit, self.most_tokens)

    @property
    def cached_tokens(self) -> int:
        """Tokens for which there is room in attention caches."""
        return sum(text.room for text in self._texts.values())

    def text(self) -> CachedText:
        """A new one."""
        return CachedText(SequenceId(next(self._numbers)))

    def forget(self, text: CachedText) -> None:
        """Free its cache. Harmless when repeated; it can be gone on with."""
        if self._texts.pop(text.sequence, None) is not None:
            self._executor.release(text.sequence)
        text.clear()

    @torch.inference_mode()
    def logits(self, wanted: Sequence[tuple[CachedText, Sequence[int], int]]) -> torch.Tensor:
        """What comes after each text, once it consists of these token ids: float32 ``[texts, vocabulary]``.

        With each comes how many of the ids are certain. What is cached of the same ids is not computed again;
        what is cached of others is rolled back. Texts are of `longest` tokens at most, `most_texts` at a time
        and `most_tokens` in all. Raise what the executor does; the texts are forgotten then.
        """
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            last = []
            self._make_room(wanted)
            for text, ids, certain in wanted:
                start = min(text.common(ids, certain), len(ids) - 1)
                while len(ids) - start > _PREFILL:
                    self._run([(text, ids[start : start + _PREFILL], start)])
                    start += _PREFILL
                last.append((text, ids[start:], start))
            return self.parts.logits(self._run(last))
        except BaseException:
            for text, _, _ in wanted:
                self.forget(text)
            raise

    def close(self) -> None:
        """Free caches and weights. Harmless when repeated."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._executor.close())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _run(self, pieces: Sequence[tuple[CachedText, Sequence[int], int]]) -> torch.Tensor:
        """New tokens of each text, from a position on, in one pass; a row of hidden states for each text."""
        ids = [token for _, new, _ in pieces for token in new]
        positions = [start + place for _, new, start in pieces for place in range(len(new))]
        rows = torch.split(self.parts.embed(ids, positions), [len(new) for _, new, _ in pieces])
        batch = [
            ScheduledChunk(
                to_wire("hidden", hidden),
                0,
                self._executor.span,
                (Segment(text.sequence, start, len(new)),),
                reply="last",
            )
            for (text, new, start), hidden in zip(pieces, rows, strict=True)
        ]
        outputs = []
        for (text, new, start), output in zip(
            pieces, self._loop.run_until_complete(self._executor.step(batch)), strict=True
        ):
            if isinstance(output, SwarmError):
                raise output
            text.tokens[start:] = new
            outputs.append(to_torch(output))
        self.computed += len(ids)
        return torch.cat(outputs)

    def _make_room(self, wanted: Sequence[tuple[CachedText, Sequence[int], int]]) -> None:
        for text, ids, _ in wanted:
            if text.room < len(ids):
                text.room = min(-(-len(ids) // _ROOM) * _ROOM, self.most_tokens)
                self._executor.reserve(text.sequence, text.room)
            self._texts[text.sequence] = text
            self._texts.move_to_end(text.sequence)
        while len(self._texts) > len(wanted) and (
            self.cached_tokens > self.most_tokens or len(self._texts) > self.most_texts
        ):
            self.forget(next(iter(self._texts.values())))
