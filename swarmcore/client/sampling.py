"""Choosing the next token of each sequence, with the logits processors of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from swarmcore.client.settings import GenerationSettings


class TokenChooser:
    """Chooses the tokens of one sequence, which must be told to it in order (`append`).

    What it chooses depends on its own logits, history and seed, not on what else is in the batch.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        prompt: Sequence[int],
        *,
        eos: Sequence[int] = (),
        suppressed: Sequence[int] = (),
    ) -> None:
        self.processors = _processors(settings, len(prompt), eos, suppressed)
        self._generator: torch.Generator | None = None
        if not settings.greedy:
            self._generator = torch.Generator()
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)
        self._history = torch.tensor(prompt) if self.processors else torch.empty(0, dtype=torch.long)
        self._length = len(prompt)

    @property
    def takes_the_likeliest(self) -> bool:
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
        """Draw so many times as `choose` does, so that the next choice is that of a run that got so far.

        How much chance a choice uses up depends on the size of the vocabulary alone.
        """
        if self._generator is not None:
            even = torch.ones(1, vocabulary)
            for _ in range(choices):
                torch.multinomial(even, 1, generator=self._generator)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from ``[vocabulary]`` logits in float32, which may be overwritten."""
        scores = logits[None]
        if self.processors:
            scores = self.processors(self._history[None, : self._length], scores)
        if self._generator is None:
            return int(scores.argmax(-1))
        probabilities = torch.softmax(scores, -1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def choose_tokens(logits: torch.Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """One token for each row of ``[rows, vocabulary]`` logits in float32."""
    if all(chooser.takes_the_likeliest for chooser in choosers):
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    return [chooser.choose(row) for chooser, row in zip(choosers, logits, strict=True)]


def _processors(
    settings: GenerationSettings, prompt_length: int, eos: Sequence[int], suppressed: Sequence[int]
) -> LogitsProcessorList:
    """In the order in which transformers' ``generate`` applies them."""
    found: list[Any] = []
    if settings.repetition_penalty is not None and settings.repetition_penalty != 1.0:
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.no_repeat_ngram_size:
        found.append(logits_process.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.min_new_tokens and eos:
        minimum = logits_process.MinNewTokensLengthLogitsProcessor
        found.append(minimum(prompt_length, settings.min_new_tokens, list(eos)))
    if suppressed:
        found.append(logits_process.SuppressTokensLogitsProcessor(list(suppressed)))
    found.extend(settings.logits_processors)
    if settings.temperature:
        if settings.temperature != 1.0:
            found.append(logits_process.TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            found.append(logits_process.TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1.0:
            found.append(logits_process.TopPLogitsWarper(float(settings.top_p)))
        if settings.min_p:
            found.append(logits_process.MinPLogitsWarper(float(settings.min_p)))
    return LogitsProcessorList(found)
