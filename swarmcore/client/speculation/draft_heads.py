"""Drafts of a head that was trained for it: one block, on what the model itself made of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from swarmcore.client.speculation.drafter import STOP_BELOW, Drafter, DraftSource


class HeadParts(Protocol):
    """What a head shares with the model, on the client."""

    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """``[tokens, hidden size]``, as they go into the first block."""

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of the last block, ``[rows, hidden size]``, as the output layer reads it."""

    def project(self, normed: torch.Tensor) -> torch.Tensor:
        """The output layer: float32 ``[rows, vocabulary]``."""


class DraftHead:
    """One block that makes of what the model made of a token, and of the next token, what it would make of
    that one."""

    def __init__(self, enter: nn.Module, base: Any, dtype: torch.dtype) -> None:
        """``enter`` takes embeddings and normed hidden states, ``[1, tokens, hidden size]`` each; ``base`` is
        a base model of Transformers with one block, and with what comes after that."""
        self._enter = enter.eval().requires_grad_(False)
        self._base = base.eval().requires_grad_(False)
        self._dtype = dtype

    def cache(self) -> Any:
        """Keys and values of one sequence."""
        from transformers import DynamicCache

        return DynamicCache(config=self._base.config)

    @torch.inference_mode()
    def run(self, embedded: torch.Tensor, normed: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
        """Go on by some tokens, the first at ``position``: ``[tokens, hidden size]`` in, and out, normed."""
        entered = self._enter(embedded[None].to(self._dtype), normed[None].to(self._dtype))
        output = self._base(
            inputs_embeds=entered,
            position_ids=torch.arange(position, position + entered.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden


class DraftHeads(DraftSource):
    """Drafters that are a head of the model's own, each with a sequence of its own."""

    name = "heads"
    wants_hidden = True

    def __init__(self, head: DraftHead, parts: HeadParts, *, stop_below: float = STOP_BELOW) -> None:
        self.head = head
        self.parts = parts
        self.stop_below = stop_below

    def drafter(self, *, owner: str = "") -> HeadDrafter:
        return HeadDrafter(self)


class HeadDrafter(Drafter):
    """Made by `DraftHeads.drafter`. It proposes nothing before it has been shown a row of its text."""

    name = DraftHeads.name
    wants_hidden = True

    def __init__(self, source: DraftHeads) -> None:
        self._source = source
        self._text: list[int] = []
        self._cache: Any = source.head.cache()
        self._done = 0
        """Rows of tokens before this position have gone through the head, as far as they were shown."""
        self._latest: torch.Tensor | None = None
        """What the head made of the last of them: ``[1, hidden size]``."""
        self._rows: torch.Tensor | None = None
        """Those that wait for the token after theirs, the first of position `_done`; normed."""

    def append(self, tokens: Sequence[int]) -> None:
        self._text.extend(tokens)

    def observe(self, start: int, hidden: torch.Tensor) -> None:
        if not len(hidden):
            return
        rows = self._source.parts.normed(hidden)
        end = self._done + (0 if self._rows is None else len(self._rows))
        if start == end and self._rows is not None:
            self._rows = torch.cat([self._rows, rows])
        elif start == end and self._latest is not None:
            self._rows = rows
        else:
            # Rows before these are missing: what the head knows begins with them.
            self._cache, self._done, self._latest, self._rows = self._source.head.cache(), start, None, rows
        self._take_in()

    def propose(self, ahead: Sequence[int], k: int) -> list[int]:
        self._take_in()
        self.probabilities = probabilities = list[float]()
        if self._latest is None or k < 1:
            return []
        latest, known, together = self._latest, self._cache.get_seq_length(), 1.0
        # The next tokens are known to be these; the model's own rows of them are not there yet.
        given = [*self._text[self._done + 1 :], *ahead]
        tokens: list[int] = []
        position = self._done
        try:
            while True:
                for token in given:
                    latest = self._run([token], latest, position)
                    position += 1
                logits = self._source.parts.project(latest)[0]
                best, choice = logits.max(-1)
                likely = float(torch.exp(best - logits.logsumexp(-1)))
                tokens.append(int(choice))
                probabilities.append(likely)
                together *= likely
                if len(tokens) == k or together < self._source.stop_below:
                    return tokens
                given = tokens[-1:]
        finally:
            if guessed := self._cache.get_seq_length() - known:
                self._cache.crop(-guessed)

    def close(self) -> None:
        self._text, self._rows, self._latest, self._cache = [], None, None, None

    def _take_in(self) -> None:
        """Have the head go on by the rows whose next token is known."""
        count = min(len(self._rows) if self._rows is not None else 0, len(self._text) - 1 - self._done)
        if count < 1:
            return
        assert self._rows is not None
        next_tokens = self._text[self._done + 1 : self._done + 1 + count]
        self._latest = self._run(next_tokens, self._rows[:count], self._done)[-1:]
        rest = self._rows[count:]
        self._rows = rest if len(rest) else None
        self._done += count

    def _run(self, tokens: Sequence[int], rows: torch.Tensor, position: int) -> torch.Tensor:
        """``rows`` are of ``position`` on, ``tokens`` come one later."""
        positions = range(position + 1, position + 1 + len(tokens))
        embedded = self._source.parts.embed(tokens, positions)
        return self._source.head.run(embedded, rows, position + 1, self._cache)
