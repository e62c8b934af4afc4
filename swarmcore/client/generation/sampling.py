"""Choosing the next token of each sequence, with the logits processors of transformers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import attrs
import torch
from transformers import LogitsProcessorList, SynthIDTextWatermarkLogitsProcessor

from swarmcore.errors import InputError, RemoteFaultError


class Sampler:
    """Chooses the tokens of one sequence, which must be told to it in order (`append`).

    What it chooses depends on its own logits, history and seed, not on what else is in the batch.
    """

    def __init__(
        self, prompt: Sequence[int], processors: LogitsProcessorList, *, greedy: bool, seed: int | None = None
    ) -> None:
        """``processors`` are of this sequence alone. Without a ``seed`` it draws others every time."""
        self.processors = processors
        self._generator: torch.Generator | None = None
        self._seeded = seed is not None
        if not greedy:
            self._generator = torch.Generator()
            if seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(seed)
        self._history = torch.tensor(prompt) if processors else torch.empty(0, dtype=torch.long)
        self._length = len(prompt)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the choice is the largest logit, whatever came before."""
        return self._generator is None and not self.processors

    def append(self, token: int) -> None:
        """Note that the sequence goes on with ``token``."""
        if self.processors:
            if self._length == len(self._history):
                self._history = torch.cat(
                    [self._history, torch.empty(max(64, self._length), dtype=torch.long)]
                )
            self._history[self._length] = token
        self._length += 1

    def skip(self, choices: int, vocabulary: int) -> None:
        """Pass over the choices of the last so many tokens: the next one is that of a run that got so far.

        How much chance a choice uses up depends on the size of the vocabulary alone.
        """
        remembering = [p for p in self.processors if isinstance(p, SynthIDTextWatermarkLogitsProcessor)]
        even = torch.ones(1, vocabulary)
        for left in range(choices, 0, -1):
            for processor in remembering:
                processor(self._history[None, : self._length - left], even.clone())
            if self._generator is not None:
                torch.multinomial(even, 1, generator=self._generator)

    def sample(self, logits: torch.Tensor) -> int:
        """The next token, from ``[vocabulary]`` logits in float32, which may be overwritten.

        Raise `RemoteFaultError` when they are no numbers, `InputError` when processors forbid every token.
        """
        scores = logits[None]
        if self.processors:
            scores = self.processors(self._history[None, : self._length], scores)
        best, token = scores.max(-1)
        _check(best.item())
        if self._generator is None or best == math.inf:
            return int(token)
        probabilities = torch.softmax(scores, -1)
        if self._seeded:  # as transformers draws it, with as many random numbers as there are tokens
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        return _draw(probabilities[0], self._generator)


@attrs.frozen(eq=False)
class Choice:
    """What to choose for a sequence: the next token, and others as far as those ``drafted`` are right."""

    sampler: Sampler
    drafted: Sequence[int] = ()
    """Tokens that may come next; there is a row of logits before each of them, and one after the last."""
    ends: Collection[int] = ()
    """Tokens after which nothing more is chosen."""

    @property
    def rows(self) -> int:
        return len(self.drafted) + 1


@attrs.define(eq=False)
class Chosen:
    """The tokens that were chosen for one sequence, and told to its sampler."""

    tokens: list[int] = attrs.field(factory=list)
    error: Exception | None = None
    """Why there are no more: what `Sampler.sample` raises, and whatever a caller's own processors do."""


def choose(logits: torch.Tensor, choices: Sequence[Choice]) -> list[Chosen]:
    """Choose tokens by ``[rows, vocabulary]`` logits, of any dtype, which may be overwritten.

    For each sequence in turn there are `Choice.rows` of them. Its tokens are those of plain decoding: the
    first one that is not what was drafted is the last, and no random number is drawn after it.

    The likeliest tokens are found for all rows at once, as they are; only rows that more is done with are
    turned into float32.
    """
    best: list[float] = []
    tokens: list[int] = []
    if any(choice.sampler.takes_likeliest for choice in choices):
        best, tokens = (found.tolist() for found in logits.max(-1))
    found, row = [], 0
    for choice in choices:
        found.append(chosen := Chosen())
        for place, drafted in enumerate((*choice.drafted, None), row):
            try:
                if choice.sampler.takes_likeliest:
                    _check(best[place])
                    token = tokens[place]
                else:
                    token = choice.sampler.sample(logits[place].float())
            except Exception as exc:
                chosen.error = exc
                break
            choice.sampler.append(token)
            chosen.tokens.append(token)
            if token in choice.ends or token != drafted:
                break
        row += choice.rows
    return found


def _draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token, each with its probability, for a single random number."""
    sums = probabilities.cumsum(0, dtype=torch.float64)
    drawn = sums[-1:] * torch.rand(1, generator=generator, dtype=torch.float64)
    token = int(torch.searchsorted(sums, drawn, right=True))
    return token if token < len(sums) else int(probabilities.argmax())


def _check(best: float) -> None:
    if math.isnan(best):
        raise RemoteFaultError(
            "the model gave no numbers (NaN) for the next token: a server's results are damaged, or the "
            "weights do not fit the dtype that they run in"
        )
    if best == -math.inf:
        raise InputError(
            "the logits processors left no token to choose: one of them at least has to stay possible"
        )
