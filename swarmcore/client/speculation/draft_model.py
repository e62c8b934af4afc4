"""Drafts of a small language model, which runs whole on the client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch

from swarmcore.client.speculation.drafter import STOP_BELOW, Drafter, DraftRequest, DraftSource
from swarmcore.client.speculation.local_decoder import CachedText, LocalDecoder
from swarmcore.client.speculation.vocabulary import DraftText, Vocabulary

_MANY = 64
"""Tokens that are taken in as soon as they are known, rather than when a draft is wanted."""


class DraftModel(DraftSource):
    """Drafters that are one causal language model, each with a text of its own.

    They propose what the model thinks likeliest, and say how likely that is.
    """

    name = "model"

    def __init__(
        self, decoder: LocalDecoder, vocabulary: Vocabulary, *, stop_below: float = STOP_BELOW
    ) -> None:
        """``vocabulary`` says what the tokens of the model that is drafted for are to this one."""
        self.decoder = decoder
        self.vocabulary = vocabulary
        self._stop_below = stop_below

    def __repr__(self) -> str:
        return f"<DraftModel {self.decoder!r}>"

    def drafter(self, *, owner: str = "") -> ModelDrafter:
        return ModelDrafter(self)

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """As `DraftSource.propose`: a token of all texts in each pass."""
        drafts = [_Draft.of(request) for request in requests]
        for together in self._groups([draft for draft in drafts if draft.ids]):
            self._draft(together)
        return [draft.finish() for draft in drafts]

    def close(self) -> None:
        self.decoder.close()

    def _groups(self, drafts: Sequence[_Draft]) -> Iterator[list[_Draft]]:
        """Those that the decoder has room for at a time."""
        group, tokens = list[_Draft](), 0
        for draft in drafts:
            longest = len(draft.ids) + draft.wanted
            if longest > self.decoder.longest:
                continue  # too long for this model: nothing is proposed
            if len(group) == self.decoder.most_texts or tokens + longest > self.decoder.most_tokens:
                yield group
                group, tokens = [], 0
            group.append(draft)
            tokens += longest
        if group:
            yield group

    def _draft(self, drafts: list[_Draft]) -> None:
        while drafts := [draft for draft in drafts if draft.request.wanted()]:
            logits = self.decoder.logits([(each.cached, each.ids, each.certain) for each in drafts])
            best, tokens = logits[:, : self.vocabulary.usable].max(-1)
            likely = torch.exp(best - logits.logsumexp(-1))
            drafts = [
                draft
                for draft, token, probability in zip(drafts, tokens.tolist(), likely.tolist(), strict=True)
                if draft.goes_on(token, probability, self._stop_below)
            ]


class ModelDrafter(Drafter):
    """Made by `DraftModel.drafter`."""

    name = DraftModel.name

    def __init__(self, source: DraftModel) -> None:
        self.source = source
        self.text: DraftText = source.vocabulary.text()
        self.cached: CachedText = source.decoder.text()

    def append(self, tokens: Sequence[int]) -> None:
        self.text.append(tokens)
        if len(tokens) >= _MANY:
            ids, certain = self.text.draft_ids(())
            if 0 < len(ids) <= self.source.decoder.longest:
                self.source.decoder.logits([(self.cached, ids, certain)])

    def propose(self, ahead: Sequence[int], k: int) -> list[int]:
        return self.source.propose([DraftRequest(self, ahead, k)])[0]

    def close(self) -> None:
        self.source.decoder.forget(self.cached)


@attrs.define(eq=False)
class _Draft:
    """A proposal that is being made."""

    request: DraftRequest
    drafter: ModelDrafter
    cached: CachedText
    wanted: int
    """Tokens of the draft model's."""
    ids: list[int]
    """The draft model's tokens of the text, of what is ahead, and of the proposal so far."""
    certain: int
    probabilities: list[float] = attrs.field(factory=list)
    together: float = 1.0

    @classmethod
    def of(cls, request: DraftRequest) -> _Draft:
        drafter = request.drafter
        assert isinstance(drafter, ModelDrafter)
        ids, certain = drafter.text.draft_ids(request.ahead)
        # Where tokens are translated, the last one may only be the beginning of one.
        wanted = request.k + (not drafter.source.vocabulary.exact)
        return cls(request, drafter, drafter.cached, wanted, ids, certain)

    def goes_on(self, token: int, probability: float, stop_below: float) -> bool:
        """Take the next token; whether another one is wanted."""
        self.together *= probability
        self.ids.append(token)
        self.probabilities.append(probability)
        return len(self.probabilities) < self.wanted and self.together >= stop_below

    def finish(self) -> list[int]:
        """The proposal, in tokens of the model that is drafted for."""
        exact = self.drafter.source.vocabulary.exact
        self.drafter.probabilities = self.probabilities if exact else ()
        return self.drafter.text.back(self.ids, len(self.probabilities))[: self.request.k]
