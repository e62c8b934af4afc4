"""What the tokens of each layer see, as the family's own model says.

A family makes its masks through transformers' mask functions, and hands them to its layers. When a span is
loaded, one run of it under `PROBE` makes a `Mask` in place of each: a description instead of a tensor. What
reaches the attention of a layer is what that layer is to see, whatever name the config has for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from transformers import AttentionMaskInterface

from swarmcore.errors import UnsupportedModelError

PROBE = "swarmcore_probe"
"""The attention implementation under which a family's masks are `Mask` objects."""

_POSITIONS = (*range(9), 63, 64, 65, 1023, 1024, 4095, 4096, 4097, 131_071)


@attrs.frozen
class Mask:
    """A causal mask: every token sees itself and those before it, or some of them."""

    window: int | None = None
    """It sees itself and the ``window - 1`` tokens before it."""
    chunk: int | None = None
    """It sees those before it from the last position on that is divisible by ``chunk``."""

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether the tokens at the positions ``query`` see those at ``key``."""
        seen = key <= query
        if self.window:
            seen = seen & (key > query - self.window)
        if self.chunk:
            seen = seen & (query // self.chunk == key // self.chunk)
        return seen

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _changed()

    def __getitem__(self, index: object) -> Any:
        raise _changed()


FULL = Mask()


def _changed() -> UnsupportedModelError:
    return UnsupportedModelError("its layers change the attention mask, which is not served")


def describe_mask(mask_function: Callable[..., Any], local_size: int | None = None, **others: Any) -> Mask:
    """What transformers calls for a mask under `PROBE`.

    ``mask_function`` says of a batch row, a head, a query's and a key's position whether one sees the other.
    Raise `UnsupportedModelError` for masks other than causal ones, with a window or in chunks at most.
    """
    near = [] if local_size is None else [local_size * turn + step for turn in (1, 2) for step in (-1, 0, 1)]
    positions = torch.tensor(sorted({*_POSITIONS, *(place for place in near if place >= 0)}))
    query, key = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.long)
    try:
        seen = torch.as_tensor(mask_function(zero, zero, query, key)).expand(len(positions), -1)
    except Exception as exc:  # any code of the family's
        raise UnsupportedModelError(
            f"its attention mask depends on more than the positions of tokens, which is not served: {exc!r}"
        ) from exc
    kinds = [FULL] if local_size is None else [FULL, Mask(window=local_size), Mask(chunk=local_size)]
    for mask in kinds:
        if torch.equal(seen, mask.sees(query, key)):
            return mask
    bidirectional = bool((seen & (key > query)).any())
    raise UnsupportedModelError(
        "its tokens attend to tokens after them (bidirectional attention), which is not served"
        if bidirectional
        else "its attention mask is neither causal nor a sliding window nor in chunks, which is not served"
    )


AttentionMaskInterface.register(PROBE, describe_mask)
