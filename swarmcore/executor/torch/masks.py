"""Which other tokens each token attends to, layer by layer, as the family's own model says.

A family makes its masks through transformers' mask functions, and hands them to its layers. When a span is
loaded, one run of it under `PROBE` makes a `Mask` in place of each: a description instead of a tensor. What
reaches the attention of a layer is what that layer is to see, whatever name the config has for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import attrs
import torch
from transformers import AttentionMaskInterface

from swarmcore.errors import UnsupportedModelError

PROBE = "swarmcore_probe"
"""The attention implementation under which a family's masks are `Mask` objects."""

_POSITIONS = (*range(9), 63, 64, 65, 1023, 1024, 4095, 4096, 4097, 131_071)


class _Description:
    """Takes the place of a mask until it reaches the attention; a family that changes it is refused."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _changed()

    def __getitem__(self, index: object) -> NoReturn:
        _changed()

    def __add__(self, other: object) -> NoReturn:
        _changed()

    __radd__ = __mul__ = __rmul__ = __invert__ = __add__


@attrs.frozen
class Mask(_Description):
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


@attrs.frozen
class OtherMask(_Description):
    """A mask that is not served. A family may make it and not use it."""

    why: str


FULL = Mask()


BIDIRECTIONAL = "its tokens attend to tokens after them (bidirectional attention), which is not served"


def describe_mask(
    mask_function: Callable[..., Any], local_size: int | None = None, **others: Any
) -> Mask | OtherMask:
    """What transformers calls for a mask under `PROBE`.

    ``mask_function`` says of a batch row, a head, a query's and a key's position whether one sees the other.
    """
    sizes = [local_size] if local_size else []
    near = [size * turn + step for size in sizes for turn in (1, 2) for step in (-1, 0, 1)]
    positions = torch.tensor(sorted({*_POSITIONS, *near}))
    query, key = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.long)
    try:
        seen = torch.as_tensor(mask_function(zero, zero, query, key)).expand(len(positions), -1)
    except Exception as exc:  # any code of the family's
        return OtherMask(
            f"its attention mask depends on more than the positions of tokens, which is not served: {exc!r}"
        )
    windows, chunks = [Mask(window=size) for size in sizes], [Mask(chunk=size) for size in sizes]
    for mask in (FULL, *windows, *chunks):
        if torch.equal(seen, mask.sees(query, key)):
            return mask
    if bool((seen & (key > query)).any()):
        return OtherMask(BIDIRECTIONAL)
    return OtherMask(
        "its attention mask is neither causal nor a sliding window nor in chunks, which is not served"
    )


def _changed() -> NoReturn:
    raise UnsupportedModelError("its layers change the attention mask, which is not served")


AttentionMaskInterface.register(PROBE, describe_mask)
