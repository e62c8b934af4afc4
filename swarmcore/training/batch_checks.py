"""Whether token ids, masks and labels can be those of a batch: said before anything is computed or sent."""

from __future__ import annotations

from typing import Literal

import torch

from swarmcore.errors import InvalidBatchError

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
"""Transformers' ``problem_type`` of a sequence classifier."""

IGNORED = -100
"""The label of what no loss is computed for."""


def check_token_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """Raise `InvalidBatchError` unless they are ``[batch, length]`` tokens of a vocabulary, at least one."""
    if ids.dim() != 2 or not ids.numel():
        raise InvalidBatchError(f"token ids are [batch, length] and not empty; got {list(ids.shape)}")
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InvalidBatchError(
            f"token ids must be whole numbers from 0 to {vocabulary - 1}; use the tokenizer of this model"
        )


def check_shape(what: str, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise `InvalidBatchError` for ``what``, masks or labels, of another shape."""
    if tuple(values.shape) != shape:
        raise InvalidBatchError(f"the {what} must be {list(shape)} for this batch, got {list(values.shape)}")


def check_token_labels(labels: torch.Tensor, shape: tuple[int, ...], vocabulary: int) -> None:
    """Raise `InvalidBatchError` unless they are ids of the vocabulary, or `IGNORED`, in this shape."""
    check_shape("labels", labels, shape)
    if not _are_classes(labels, vocabulary):
        raise InvalidBatchError(f"labels must be token ids from 0 to {vocabulary - 1}, or {IGNORED} for none")


def check_classes(labels: torch.Tensor, shape: tuple[int, ...], count: int) -> None:
    """Raise `InvalidBatchError` unless they are of ``count`` classes, or `IGNORED`, in this shape."""
    check_shape("labels", labels, shape)
    if not _are_classes(labels, count):
        raise InvalidBatchError(
            f"labels must be whole numbers from 0 to {count - 1}, or {IGNORED} for none; make the head with "
            f"as many labels as the data has (num_labels)"
        )


def problem_of(labels: torch.Tensor, count: int) -> Problem:
    """What a sequence classifier with ``count`` labels is to do, told by the labels as Transformers does."""
    if count == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_sequence_labels(labels: torch.Tensor, batch: int, count: int, problem: Problem) -> None:
    """Raise `InvalidBatchError` unless there are labels of this ``problem`` for ``batch`` sequences.

    ``[batch]`` classes for a single label or ``[batch, count]`` values for several; one value may be either.
    """
    if problem == "single_label_classification":
        check_classes(labels, (batch,), count)
    elif count == 1 and labels.dim() == 1:
        check_shape("labels", labels, (batch,))
    else:
        check_shape("labels", labels, (batch, count))


def _are_classes(labels: torch.Tensor, count: int) -> bool:
    known = (labels == IGNORED) | (labels >= 0) & (labels < count)
    return not labels.is_floating_point() and bool(known.all())
