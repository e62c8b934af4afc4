"""The base model of a remote model: the family's own, with the swarm where its loop over layers was."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import torch
from torch import nn
from transformers import PreTrainedModel

from swarmcore.errors import InputError, InvalidBatchError, SwarmError, UnsupportedModelError
from swarmcore.executor.torch.span import fixed_positions
from swarmcore.executor.torch.structure import structure_of
from swarmcore.training.batch_checks import check_token_ids
from swarmcore.training.model_layout import ModelLayout
from swarmcore.transformers.cache import PADDING, RemoteCache
from swarmcore.transformers.forward_options import check_options
from swarmcore.transformers.packing import Packing
from swarmcore.transformers.peft_layers import RemoteLayers, using_layers
from swarmcore.transformers.stack import RemoteStack, identity_of

logger = logging.getLogger(__name__)


class _ThisThread(threading.local):
    """The call that is under way. No context variable: tasks of the event loop keep copies of those, and with
    it a cache that nobody else has any more."""

    call: ForwardCall | None = None
    last_only = False
    padding = True


_this_thread = _ThisThread()


@attrs.define(eq=False)
class ForwardCall:
    """One forward call, on its way through the base model."""

    stack: RemoteStack
    positions: torch.Tensor
    """``[sequences, columns]`` of the new columns, -1 where they are padding."""
    cache: RemoteCache | None
    every_block: bool
    last_only: bool
    padding: bool = False
    """Whether something may be predicted from padding before a sequence."""
    packing: Packing | None = None
    """Where several sequences follow each other in one row; None where there is one in each."""
    states: list[torch.Tensor] = attrs.field(factory=list)
    """What went into the first block, and what came out of each but the last."""

    def through_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of the last block for ``hidden``, a row of one token for each column."""
        shape = (*self.positions.shape, hidden.shape[-1])
        return self._run(hidden.view(shape)).view(hidden.shape)

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            if not self.every_block:
                return self._forward(hidden, self.positions)
            return self._one_by_one(hidden, self.positions)
        if hidden.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "no gradients pass through a cache: call the model without past_key_values and with "
                "use_cache=False to train, or under torch.no_grad() to generate"
            )
        output = self.cache.step(hidden, self.positions, last_only=self.last_only and not self.every_block)
        if self.every_block:
            # A session gives what comes out at its end. What came out of each block takes another way there.
            new = hidden.shape[1]
            self._one_by_one(self.cache.inputs().to(hidden), self.cache.positions.to(hidden.device))
            self.states = [states[:, -new:] for states in self.states]
        return output

    def _one_by_one(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for block in range(len(self.stack.blocks)):
            self.states.append(hidden)
            hidden = self._forward(hidden, positions, block)
        return hidden

    def _forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, block: int | None = None
    ) -> torch.Tensor:
        if self.packing is None:
            return self.stack.forward(hidden, positions >= 0, block, padding=self.padding)
        return self.packing.join(self.stack.forward(*self.packing.split(hidden), block))


@contextmanager
def rows_wanted(*, last_only: bool, padding: bool) -> Iterator[None]:
    """What a base model has to bring home within it.

    With ``last_only`` no more than each sequence's last token; without ``padding`` zeros where that is.
    """
    before = _this_thread.last_only, _this_thread.padding
    _this_thread.last_only, _this_thread.padding = last_only, padding
    try:
        yield
    finally:
        _this_thread.last_only, _this_thread.padding = before


def make_remote(model: PreTrainedModel, stack: RemoteStack) -> None:
    """Have the base model of ``model``, which has no layers, send hidden states through ``stack``.

    All that the family does before its first block, and after its last one, is done by its own code. Raise
    `UnsupportedModelError` when it does nothing after its blocks, since they are put in front of that.
    """
    structure = structure_of(model.config)
    if not structure.after or structure.twice:
        raise UnsupportedModelError(
            f"{type(model).__name__} has nothing between its blocks and its head, or uses it before them, too"
        )
    norm = model.get_submodule(f"{structure.base}.{structure.after[0]}")
    norm.register_forward_pre_hook(_through_blocks)
    base = cast(Any, model.get_submodule(structure.base))  # which OPT's head calls, past its base model
    base.__class__ = _remote_base(cast(Any, type(base)))
    base.stack = stack
    layout = _layout_of(model)
    if layout is not None:
        setattr(base, structure.layers, RemoteLayers(layout, cast(torch.dtype, model.dtype)))


def _layout_of(model: PreTrainedModel) -> ModelLayout | None:
    """None for a family whose layers have no names that adapters go by."""
    try:
        return ModelLayout.of(model.config)
    except (SwarmError, AttributeError, TypeError) as exc:
        logger.debug("no adapter can be put on the layers of a %s: %s", type(model).__name__, exc)
        return None


def _through_blocks(norm: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    assert _this_thread.call is not None
    return (_this_thread.call.through_blocks(*args),)


@functools.cache
def _remote_base(family: Any) -> type[PreTrainedModel]:
    """A subclass of the family's base model whose `forward` goes through the swarm."""
    signature = inspect.signature(family.forward)
    takes = signature.parameters.keys()

    @functools.wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        check_options(self.config, given, takes)
        with using_layers(self):
            return run(self, given)

    def run(self: Any, given: dict[str, Any]) -> Any:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape, device = _inputs_of(self, ids, embeds)
        if ids is not None and (embeddings := self.get_input_embeddings())._forward_hooks:
            ids, embeds = None, embeddings(ids)  # what hooks do may depend on the shape, as NEFTune's noise
        cache = _cache_of(self.stack, given)
        columns = _columns(shape, given.get("position_ids"), cache, device)
        _check_cache_position(given.get("cache_position"), shape, cache)
        mask, packing = given.get("attention_mask"), None
        caching = given.get("use_cache")
        caching = getattr(self.config, "use_cache", True) if caching is None else caching
        if mask is None and cache is None and not caching:
            packing = Packing.of(columns)  # as Transformers, which asks for a cache to be ruled out
        call = ForwardCall(
            self.stack,
            _positions(self.config, columns, mask, cache) if packing is None else columns,
            cache,
            every_block=bool(given.get("output_hidden_states")),
            last_only=_this_thread.last_only,
            padding=_this_thread.padding,
            packing=packing,
        )
        # Every token is a row by itself, so that no mask above 1 by 1 is made: there is no attention here.
        inputs: dict[str, Any] = {
            "input_ids": None if ids is None else ids.reshape(-1, 1),
            "inputs_embeds": None if embeds is None else embeds.reshape(-1, 1, embeds.shape[-1]),
            "position_ids": (columns + self.stack.prefix_tokens).reshape(-1, 1),
            "use_cache": False,
        }
        if "token_type_ids" in takes and (types := given.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = types.reshape(-1, 1)
        before, _this_thread.call = _this_thread.call, call
        try:
            output = family.forward(self, **{k: v for k, v in inputs.items() if k in takes}, return_dict=True)
        finally:
            _this_thread.call = before
        last = output.last_hidden_state.view(*shape, -1)
        output["last_hidden_state"] = last
        if cache is not None:
            output["past_key_values"] = cache
        if call.every_block:
            output["hidden_states"] = (*call.states, last)
        as_tuple = given.get("return_dict", getattr(self.config, "return_dict", True)) is False
        return output.to_tuple() if as_tuple else output

    # Under the family's own name, by which libraries look up what a class of models can do.
    return type(family.__name__, (family,), {"forward": forward, "__module__": __name__})


def _inputs_of(
    base: PreTrainedModel, ids: torch.Tensor | None, embeds: torch.Tensor | None
) -> tuple[torch.Size, torch.device]:
    """``[batch, length]`` of a call, and where its tensors are. Raise `InputError` for none."""
    if ids is not None and embeds is None:
        check_token_ids(ids, len(cast(nn.Embedding, base.get_input_embeddings()).weight))
        return ids.shape, ids.device
    if ids is not None or embeds is None:
        raise InputError("pass either input_ids or inputs_embeds")
    if embeds.dim() != 3 or not embeds.numel():
        raise InvalidBatchError(
            f"inputs_embeds are [batch, length, hidden size] and not empty; got {list(embeds.shape)}"
        )
    return embeds.shape[:2], embeds.device


def _cache_of(stack: RemoteStack, given: dict[str, Any]) -> RemoteCache | None:
    cache = given.get("past_key_values")
    if cache is None:
        return stack.new_cache() if given.get("use_cache") else None
    if not isinstance(cache, RemoteCache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}; the attention caches of this model are on the "
            f"servers: pass model.new_cache(), or what an earlier call returned. For PEFT's prefix tuning "
            f"use swarmcore.training.deep_prompt_tuning; it has the same files"
        )
    if cache.adapter != identity_of(stack.adapter):
        raise InputError(
            "past_key_values was made for another adapter than is active now, or for none: begin with a new "
            "cache, which generate() makes by itself"
        )
    return cache


def _columns(
    shape: torch.Size, position_ids: torch.Tensor | None, cache: RemoteCache | None, device: torch.device
) -> torch.Tensor:
    """The position of each new column, as Transformers counts them where nobody says otherwise."""
    if position_ids is None:
        past = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(past, past + shape[1], device=device)[None]
    if position_ids.dim() not in (1, 2) or position_ids.shape[-1] != shape[1]:
        raise InputError(f"position_ids of shape {list(position_ids.shape)} for inputs of {list(shape)}")
    if position_ids.dim() == 2 and position_ids.shape[0] not in (1, shape[0]):
        raise InputError(f"position_ids of shape {list(position_ids.shape)} for inputs of {list(shape)}")
    return position_ids.expand(shape)


def _check_cache_position(
    position: torch.Tensor | None, shape: torch.Size, cache: RemoteCache | None
) -> None:
    """Raise `InputError` for new columns that are not to come right after those in the cache."""
    past = cache.get_seq_length() if cache is not None else 0
    if position is not None and position.flatten().tolist() != list(range(past, past + shape[1])):
        raise InputError(f"leave out cache_position: what is new comes after the {past} columns of the cache")


def _positions(
    config: Any, columns: torch.Tensor, mask: torch.Tensor | None, cache: RemoteCache | None
) -> torch.Tensor:
    """``columns``, with -1 where the mask says padding.

    Raise `InputError` for a mask of the wrong shape, and for tokens whose positions do not follow each other:
    servers count a sequence's tokens one after the other.
    """
    batch, new = columns.shape
    if cache is not None:
        cache.check_batch(batch)
    past = cache.positions.to(columns.device) if cache is not None else columns[:, :0]
    if mask is None:
        real = torch.ones_like(columns, dtype=torch.bool)
    elif (
        isinstance(mask, torch.Tensor)
        and mask.dim() == 2
        and mask.shape[0] == batch
        and mask.shape[1] in (new, past.shape[1] + new)
    ):
        real = mask[:, -new:].bool()
        if mask.shape[1] > new and not torch.equal(mask[:, :-new].bool(), past >= 0):
            raise InputError(
                "the attention_mask is another one than before for what is in the cache, where servers have "
                "every token of a sequence and no padding"
            )
    else:
        what = (
            f"of shape {list(mask.shape)}"
            if isinstance(mask, torch.Tensor)
            else f"is a {type(mask).__name__}"
        )
        raise InputError(
            f"attention_mask {what}; expected [{batch}, {past.shape[1] + new}], with 0 for padding: servers "
            f"have the causal masks of the model, and no others"
        )
    positions = columns.masked_fill(~real, PADDING)
    every = torch.cat([past, positions], 1) if past.numel() else positions
    there = every >= 0
    # The same for all tokens of a sequence when each comes one after the one before.
    offsets = every - there.long().cumsum(1)
    lowest = offsets.masked_fill(~there, torch.iinfo(offsets.dtype).max).amin(1, keepdim=True)
    if not (offsets == lowest)[there].all():
        raise InputError(
            "the tokens of a sequence do not follow each other by their position_ids or mask: padding "
            "may be before and after a sequence, and position_ids go on where it ended; for several "
            "sequences in a row pass use_cache=False, and no attention_mask"
        )
    limit = fixed_positions(config)
    if limit is not None and (there & (offsets != -1) & (every >= limit)).any():
        raise InputError(
            f"positions from {limit} on change the rotary embedding of the whole sequence, and servers count "
            f"them from each sequence's first token: let position_ids begin at 0"
        )
    return positions
