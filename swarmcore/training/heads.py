"""Heads on top of the last block, as in Transformers: classes of a whole sequence, or of each token."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional

from swarmcore.errors import AdapterError, InvalidBatchError, UnsupportedModelError
from swarmcore.training.batch_checks import (
    Problem,
    check_classes,
    check_sequence_labels,
    check_shape,
    problem_of,
)


class ClassificationHead(nn.Module):
    """A linear layer from hidden states to logits: the part common to the two kinds of heads."""

    task: ClassVar[str]
    """PEFT's name of what it does."""
    has_bias: ClassVar[bool]

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        name: str = "score",
        dropout: float = 0.0,
        std: float = 0.02,
        seed: int | None = None,
    ) -> None:
        """``name`` is how the family's Transformers class calls the layer; files have it.

        Its weight is drawn from a normal distribution with the deviation ``std``, as Transformers does;
        without a ``seed``, from torch's global generator.
        """
        if num_labels < 1:
            raise AdapterError(f"a head has 1 label or more, got {num_labels}")
        super().__init__()
        self.name = name
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, num_labels, bias=self.has_bias, dtype=torch.float32)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(0.0, std, generator=generator)
            if self.linear.bias is not None:
                self.linear.bias.zero_()

    @classmethod
    def for_model(
        cls, model_config: Any, num_labels: int, *, dropout: float = 0.0, seed: int | None = None
    ) -> Self:
        """A new head for the model with this Transformers config.

        Raise `UnsupportedModelError` when Transformers has no such head for the family.
        """
        config = model_config.get_text_config(decoder=True)
        return cls(
            config.hidden_size,
            num_labels,
            name=cls._layer_name(config),
            dropout=dropout,
            std=getattr(config, "initializer_range", 0.02),
            seed=seed,
        )

    @classmethod
    def _layer_name(cls, config: Any) -> str:
        """How the family's Transformers class calls the layer, or `UnsupportedModelError`."""
        try:
            with torch.device("meta"):
                model = cls._auto_class().from_config(config)
        except ValueError as exc:
            raise UnsupportedModelError(
                f"Transformers has no {cls.task} head for {config.model_type}: make one of your own, as any "
                f"module on the hidden states"
            ) from exc
        return next(name for name in ("score", "classifier") if hasattr(model, name))

    @staticmethod
    def _auto_class() -> Any:
        raise NotImplementedError

    @property
    def num_labels(self) -> int:
        return self.linear.out_features

    def check_labels(self, labels: torch.Tensor, batch: int, length: int) -> None:
        """Raise `InvalidBatchError` unless `loss` can be computed with them, for token ids of that shape."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.task}, {self.num_labels} labels"


class SequenceClassificationHead(ClassificationHead):
    """One row of logits for each sequence, of its last token that is not padding."""

    task = "SEQ_CLS"
    has_bias = False

    def __init__(
        self, hidden_size: int, num_labels: int, *, problem: Problem | None = None, **options: Any
    ) -> None:
        """``problem`` None: told by the labels, as Transformers does. ``options`` as of the base class."""
        super().__init__(hidden_size, num_labels, **options)
        self.problem = problem

    @staticmethod
    def _auto_class() -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, length, hidden size]`` after the final norm to ``[batch, labels]``.

        ``attention_mask`` ``[batch, length]`` is 0 for padding, on either side; None for no padding. Raise
        `InvalidBatchError` when its shape is another, or a sequence is all padding.
        """
        if attention_mask is None:
            last = hidden[:, -1]
        else:
            check_shape("attention mask", attention_mask, tuple(hidden.shape[:2]))
            real = attention_mask.to(hidden.device) != 0
            if not bool(real.any(dim=1).all()):
                raise InvalidBatchError("a sequence of the batch is all padding; leave it out")
            places = torch.arange(hidden.shape[1], device=hidden.device)
            last = hidden[torch.arange(len(hidden), device=hidden.device), (places * real).argmax(dim=1)]
        logits: torch.Tensor = self.linear(self.dropout(last))
        return logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean squared error, cross entropy, or binary cross entropy for each label, after `problem`.

        ``labels`` are ``[batch]`` classes, or ``[batch, labels]`` values. Raise `InvalidBatchError` for
        another shape, and for classes that the head does not have.
        """
        self.check_labels(labels, len(logits))
        logits, labels = logits.float(), labels.to(logits.device)
        problem = self.problem or problem_of(labels, self.num_labels)
        if problem == "single_label_classification":
            return functional.cross_entropy(logits, labels.long())
        if problem == "regression":
            return functional.mse_loss(logits, labels.float().view_as(logits))
        return functional.binary_cross_entropy_with_logits(logits, labels.float())

    def check_labels(self, labels: torch.Tensor, batch: int, length: int = 0) -> None:
        problem = self.problem or problem_of(labels, self.num_labels)
        check_sequence_labels(labels, batch, self.num_labels, problem)


class TokenClassificationHead(ClassificationHead):
    """A row of logits for each token."""

    task = "TOKEN_CLS"
    has_bias = True

    @staticmethod
    def _auto_class() -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden size]`` after the final norm to ``[batch, length, labels]``."""
        logits: torch.Tensor = self.linear(self.dropout(hidden))
        return logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over all tokens whose label, ``[batch, length]``, is not -100.

        Raise `InvalidBatchError` for another shape, and for classes that the head does not have.
        """
        self.check_labels(labels, *logits.shape[:2])
        labels = labels.to(logits.device)
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.long().flatten())

    def check_labels(self, labels: torch.Tensor, batch: int, length: int) -> None:
        check_classes(labels, (batch, length), self.num_labels)
