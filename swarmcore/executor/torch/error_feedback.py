"""Error feedback: what a lossy encoding dropped is sent with the next tensor of the same name.

For tensors that add up at the other end over time, each entry in its own place: deltas of parameters, and
gradients of the same weights step after step. There nothing is lost, only late, and even a codec that keeps a
hundredth of the entries gets all of it across. Hidden states and their gradients are *not* such tensors: the
next ones belong to other tokens, and the error of one token is noise to another. They go without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.wire.tensors import Tensor


class ErrorFeedback:
    """What is still to be sent of each tensor, by name, in float32 on the CPU.

    Holds as much memory as the tensors encoded through it take in float32; `forget` frees. Keep one object
    for each receiver, or for all that get the same bytes.
    """

    def __init__(self) -> None:
        self._left: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<ErrorFeedback of {len(self._left)} tensors>"

    def __getitem__(self, name: str) -> torch.Tensor:
        """What is still to be sent. Raise `KeyError` for a name never encoded."""
        return self._left[name]

    def encode(self, name: str, values: torch.Tensor, codec: str) -> Tensor:
        """``values`` with what was left of those before, in ``codec``; what that drops is left for the next.

        What was left is dropped when the shape is another than before, and nothing is left of values that are
        not finite. Raise what `Tensor.encode` raises; nothing changes then.
        """
        whole = values.detach().float().cpu()
        left = self._left.get(name)
        if left is not None and left.shape == whole.shape:
            whole = whole + left
        wire = to_wire(name, whole.to(values.dtype), codec)
        missing = whole - to_torch(wire).float()
        self._left[name] = missing if bool(missing.isfinite().all()) else torch.zeros_like(whole)
        return wire

    def returned(self, tensor: Tensor) -> None:
        """``tensor``, from `encode`, did not arrive: all of it is still to be sent."""
        left = self._left.get(tensor.name)
        values = to_torch(tensor).float()
        if left is not None and left.shape == values.shape and bool(values.isfinite().all()):
            self._left[tensor.name] = left + values

    def forget(self, name: str | None = None) -> None:
        """Drop what is left of one tensor, or of all. Harmless when there is nothing."""
        if name is None:
            self._left.clear()
        else:
            self._left.pop(name, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For a checkpoint; shares no memory that changes later."""
        return dict(self._left)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self._left = {name: values.float().cpu() for name, values in state.items()}
