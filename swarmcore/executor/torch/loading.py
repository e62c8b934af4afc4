"""Transformers' own loader: it knows how checkpoints differ from modules (fused experts, old names)."""

from __future__ import annotations

from typing import Any

import torch

from swarmcore.checkpoint.base import one_line
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.errors import CheckpointError, MissingExtraError
from swarmcore.executor.torch.device import is_out_of_memory


def load_state(
    family: Any, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, name: str
) -> tuple[Any, dict[str, Any]]:
    """A model of the class ``family`` with these tensors, and what the loader says of them.

    That is ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``: of these the name, the shape in the
    checkpoint and that in the model. Raise `CheckpointError` when they do not fit the config otherwise; a
    lack of memory is not told otherwise than torch does.
    """
    with quiet_transformers(lambda share: None):
        try:
            model, report = family.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # it names none of them in its error
            )
        except ImportError as exc:
            raise MissingExtraError(f"transformers needs a package to load {name}: {one_line(exc)}") from exc
        except Exception as exc:  # whatever the family's own classes raise
            if is_out_of_memory(exc):
                raise
            why = one_line(exc)
            if "CONVERSION" in why:  # in a report that it logs
                why = "some experts or other parts that are joined are missing, too many or misshapen"
            raise CheckpointError(f"the tensors of {name} do not fit its config: {why}") from exc
    return model, report


def misshapen(name: str, tensor: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
    """The error for a tensor of another shape than its config says."""
    return CheckpointError(
        f"{name} has {tensor} in the shape {list(found)}, and by its config it is {list(expected)}: the "
        f"checkpoint is damaged or not the one its config describes"
    )
