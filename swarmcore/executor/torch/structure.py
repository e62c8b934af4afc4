"""Where a family's own model has its blocks, and what it does between the last of them and the head.

Neither follows from names: a base model with one block that does nothing is run, and observed.
"""

from __future__ import annotations

import inspect
from typing import Any

import attrs
import torch
from torch import nn

from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.torch.partial_model import build_on_meta, cut_config, find_base, layer_list
from swarmcore.types import Span


@attrs.frozen
class Structure:
    """Of the causal language model of a config."""

    base: str
    """Path of the module that owns the list of blocks, such as ``model`` or ``model.decoder``."""
    layers: str
    """Name of the list in it, such as ``layers`` or ``h``."""
    after: tuple[str, ...]
    """The modules in it that come after the last block, in their order: a final norm, a projection."""
    twice: tuple[str, ...] = ()
    """Those of them that it calls before the first block, too."""


def structure_of(config: Any) -> Structure:
    """The structure of the causal language model of this text config.

    Raise `UnsupportedModelError` when its blocks are in no list, or when what comes after them is more than
    one module after the other.
    """
    model = build_on_meta(cut_config(config, Span(0, 1)))
    path, base = find_base(model)
    layers = layer_list(base)
    (block,) = blocks = getattr(base, layers)
    setattr(base, layers, nn.ModuleList())
    base.to_empty(device="cpu").float().eval()  # whatever the weights are in: some norms take no other input
    setattr(base, layers, blocks)
    failed: Exception | None = None
    for as_tuple in (False, True):
        try:
            after = _modules_after(base, block, as_tuple)
        except Exception as exc:  # a family that takes a block's output apart, and finds a tensor
            failed = exc
            continue
        if after is not None:
            return Structure(path, layers, *after)
    raise UnsupportedModelError(
        f"what a model of type {config.model_type!r} does between its last block and its head is not known"
    ) from failed


@torch.no_grad()
def _modules_after(
    base: Any, block: nn.Module, as_tuple: bool
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names of what ``base`` calls after ``block``, each on what the one before gave; None: it does more.

    With them come those that it called before, too. Blocks give a tensor, or a tuple that begins with it:
    ``as_tuple`` says which of the two to try.
    """
    given: list[torch.Tensor] = []
    before: set[str] = set()
    after: list[str] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        given.append(torch.zeros_like(hidden))
        return (given[0],) if as_tuple else given[0]

    def watch(name: str) -> Any:
        def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not given:
                before.add(name)
            elif args and _same(args[0], given[-1]) and isinstance(output, torch.Tensor):
                after.append(name)
                given.append(output)

        return called

    hooks = [child.register_forward_hook(watch(name)) for name, child in base.named_children()]
    block.forward = forward
    try:
        width = base.get_input_embeddings().weight.shape[-1]
        embeddings = torch.zeros(2, 1, width, dtype=torch.float32)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        if "position_ids" in inspect.signature(type(base).forward).parameters:
            inputs["position_ids"] = torch.zeros(2, 1, dtype=torch.long)
        output = base(**inputs, return_dict=True).last_hidden_state
    finally:
        del block.forward
        for hook in hooks:
            hook.remove()
    if not given or not _same(output, given[-1]):
        return None
    return tuple(after), tuple(name for name in after if name in before)


def _same(one: Any, other: torch.Tensor) -> bool:
    """Whether they are views of the same numbers."""
    return (
        isinstance(one, torch.Tensor) and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
    )
