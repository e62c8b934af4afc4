"""Soft prompts: trained embeddings before every sequence (prompt tuning, arXiv 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from swarmcore.errors import AdapterError
from swarmcore.training.batch_checks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SoftPrompt(nn.Module):
    """``tokens`` virtual tokens ``[tokens, hidden size]``, which the client puts before its embeddings.

    They are what Transformers calls ``inputs_embeds``: whatever a family does to the embeddings of tokens
    before its first block (positions, norms) is done to them as well. The first real token of a sequence is
    at position ``tokens``.
    """

    def __init__(self, values: torch.Tensor) -> None:
        """Of ``values``, ``[tokens, hidden size]``; a copy of them is trained."""
        super().__init__()
        if values.dim() != 2 or not values.numel():
            raise AdapterError(f"a soft prompt is [tokens, hidden size], got {list(values.shape)}")
        self.embeddings = nn.Parameter(values.detach().clone())

    @classmethod
    def random(
        cls,
        tokens: int,
        hidden_size: int,
        *,
        std: float = 1.0,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Drawn from a normal distribution, as PEFT does. Embeddings of most models are much smaller."""
        _check_tokens(tokens)
        values = torch.randn(tokens, hidden_size, generator=_generator(seed), dtype=torch.float32)
        return cls((values * std).to(dtype))

    @classmethod
    def from_vocabulary(cls, tokens: int, embeddings: nn.Embedding, *, seed: int | None = None) -> Self:
        """Embeddings of tokens drawn from the vocabulary, in float32."""
        _check_tokens(tokens)
        ids = torch.randint(0, embeddings.num_embeddings, (tokens,), generator=_generator(seed))
        return cls(_look_up(embeddings, ids))

    @classmethod
    def from_text(
        cls,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        embeddings: nn.Embedding,
        *,
        tokens: int | None = None,
    ) -> Self:
        """`from_ids` of a text, as ``tokenizer(text)`` encodes it."""
        return cls.from_ids(list(tokenizer(text)["input_ids"]), embeddings, tokens=tokens)

    @classmethod
    def from_ids(cls, ids: Sequence[int], embeddings: nn.Embedding, *, tokens: int | None = None) -> Self:
        """Embeddings of a text's token ids, in float32: cut, or repeated, to ``tokens`` where given.

        Raise `AdapterError` for an empty text, or ids outside of the vocabulary.
        """
        if not ids:
            raise AdapterError("the text of a soft prompt has no tokens; pass another one")
        if not 0 <= min(ids) <= max(ids) < embeddings.num_embeddings:
            raise AdapterError(f"token ids must be from 0 to {embeddings.num_embeddings - 1}")
        tokens = len(ids) if tokens is None else tokens
        _check_tokens(tokens)
        repeated = [ids[index % len(ids)] for index in range(tokens)]
        return cls(_look_up(embeddings, torch.tensor(repeated)))

    @property
    def tokens(self) -> int:
        """How many positions it takes."""
        return self.embeddings.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.embeddings.shape[1]

    def extra_repr(self) -> str:
        return f"{self.tokens} tokens, hidden size {self.hidden_size}"

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Put it before each sequence: ``[batch, length, hidden]`` to ``[batch, tokens + length, hidden]``.

        The result has the dtype and device of the input. Raise `AdapterError` for another hidden size.
        """
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.hidden_size:
            raise AdapterError(
                f"the soft prompt is for embeddings [batch, length, {self.hidden_size}], got "
                f"{list(inputs_embeds.shape)}: it was made for another model"
            )
        prompt = self.embeddings.to(inputs_embeds).expand(len(inputs_embeds), -1, -1)
        return torch.cat([prompt, inputs_embeds], dim=1)

    def extend_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The mask ``[batch, length]`` of real tokens, with the prompt's: ``[batch, tokens + length]``."""
        return torch.cat([attention_mask.new_ones(len(attention_mask), self.tokens), attention_mask], dim=1)

    def extend_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels ``[batch, length]``, with none for the prompt: ``[batch, tokens + length]``."""
        return torch.cat([labels.new_full((len(labels), self.tokens), IGNORED), labels], dim=1)


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise AdapterError(f"a soft prompt has 1 token or more, got {tokens}")


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _look_up(embeddings: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = embeddings(ids.to(embeddings.weight.device))
    return found.float()
