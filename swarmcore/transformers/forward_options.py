"""What a forward call may be given besides tokens; what would be ignored is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from swarmcore.errors import InputError
from swarmcore.transformers.packing import check_packed

_HONOURED = frozenset(
    {
        "attention_mask",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "output_hidden_states",
        "past_key_values",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
_OF_THE_LOSS = frozenset({"labels", "logits_to_keep", "num_items_in_batch", "shift_labels"})
"""Used outside of the base model, which families hand them on to."""

_AS_SERVERS_DO: Mapping[str, object] = {
    "is_causal": True,
    "output_attentions": False,
    "output_router_logits": False,
}
"""Values that ask for what is done anyway."""

_REASONS = {
    "output_attentions": "the attention weights are on the servers, which do not send them",
    "output_router_logits": "the routers of the experts are on the servers, so there is no loss that "
    "balances them (router_aux_loss_coef=0 leaves it out)",
}
_OF_PACKED_ROWS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""What some attention kernels ask besides the position ids that tell packed sequences apart."""


def check_options(config: Any, given: Mapping[str, Any], takes: Collection[str]) -> None:
    """Raise `InputError` for an argument of a base model's ``forward`` that would be ignored.

    ``takes`` are the names that the family's own ``forward`` has.
    """
    known = _HONOURED | _OF_THE_LOSS | {"self"}
    asked = {name: value for name, value in given.items() if name not in known}
    for name in ("output_attentions", "output_router_logits"):
        if asked.get(name) is None and getattr(config, name, False):
            asked[name] = True
    if any(given.get(name) is not None for name in _OF_PACKED_ROWS):
        check_packed(given)
        asked = {name: value for name, value in asked.items() if name not in _OF_PACKED_ROWS}
    for name, value in asked.items():
        if value is not None and not (name in _AS_SERVERS_DO and value is _AS_SERVERS_DO[name]):
            reason = _REASONS.get(name, "it would change the result, and servers do not compute it")
            raise InputError(f"leave out {name}: {reason}")
    types = given.get("token_type_ids")
    if types is not None and "token_type_ids" not in takes and bool(torch.as_tensor(types).any()):
        raise InputError("leave out token_type_ids: this family has none, and they are not all 0")
