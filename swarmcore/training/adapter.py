"""What remote blocks use besides their own weights, owned by the client: the part common to all kinds."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import nn

from swarmcore.errors import AdapterError
from swarmcore.types import Span


class BlockAdapter(nn.Module):
    """Trainable weights for blocks that servers run; pass one as ``adapter=`` where blocks are called.

    Its parameters are what is sent, under the names of `swarmcore.wire.forward_backward.AdapterPart`, and
    receive their gradients from there. An ordinary module otherwise: it has a state dict, and goes into an
    optimiser.
    """

    scaling: float
    """What the products of its low-rank updates are multiplied by."""
    prefix_tokens: int
    """Positions that it puts before the first token of every sequence."""

    def __init__(self, *, scaling: float = 1.0, prefix_tokens: int = 0) -> None:
        super().__init__()
        self.scaling = scaling
        self.prefix_tokens = prefix_tokens
        self.blocks = nn.Module()
        """A tree of modules in which the path of a parameter is its name on the wire."""

    def extra_repr(self) -> str:
        found = self.covered_blocks
        held = f"blocks {found[0]} to {found[-1]}" if found else "no blocks"
        return f"{held}, {sum(weight.numel() for weight in self.parameters())} values"

    @property
    def covered_blocks(self) -> tuple[int, ...]:
        """The blocks that it has weights for, in order."""
        return tuple(sorted({_block_of(name) for name, _ in self._weights()}))

    @property
    def identity(self) -> object:
        """Equal for the same adapter, whatever its weights are by now."""
        return id(self)

    @property
    def version(self) -> str:
        """32 hex digits that stand for all values, names and scaling; equal weights have the same anywhere.

        It is a hash of the bytes (SHA-256, cut), computed when asked for, because nothing less notices every
        way of changing a weight: writes to ``.data`` leave no trace in torch's version counters. Ask once for
        each pass, not for each micro-batch: a million values take some 5 ms.
        """
        digest = hashlib.sha256(struct.pack("<dq", self.scaling, self.prefix_tokens))
        for name, weight in self._weights():
            values = weight.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def named_weights(self, span: Span | None = None) -> dict[str, torch.Tensor]:
        """The parameters of the blocks ``span`` (None: of all) under their names on the wire.

        The parameters themselves, always in the same order: by block, then as modules follow each other in
        it, ``lora_A`` before ``lora_B``. Empty where it has none for these blocks.
        """
        return {name: weight for name, weight in self._weights() if span is None or _block_of(name) in span}

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.blocks.named_parameters()

    def _add_weight(self, name: str, values: torch.Tensor) -> None:
        """Make ``values`` the parameter with that name on the wire."""
        *path, last = name.split(".")
        module = self.blocks
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(values))


class CombinedAdapter(BlockAdapter):
    """Several adapters used as one, such as low-rank updates with a prefix. It shares their parameters.

    Raise `AdapterError` when two of them have a weight of one name, put prefixes of different lengths before
    the sequences, or scale low-rank updates differently.
    """

    def __init__(self, *parts: BlockAdapter) -> None:
        if not parts:
            raise AdapterError("nothing to combine: pass at least one adapter")
        prefixes = {part.prefix_tokens for part in parts if part.prefix_tokens}
        scalings = {part.scaling for part in parts if _has_updates(part)}
        if len(prefixes) > 1:
            raise AdapterError(f"prefixes of different lengths cannot be combined: {sorted(prefixes)} tokens")
        if len(scalings) > 1:
            raise AdapterError(
                f"low-rank updates with different scalings cannot be combined: {sorted(scalings)}; give them "
                f"the same alpha / rank"
            )
        names = [name for part in parts for name in part.named_weights()]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise AdapterError(f"more than one of the adapters has weights for {', '.join(doubled[:3])}")
        super().__init__(scaling=scalings.pop() if scalings else 1.0, prefix_tokens=max(prefixes, default=0))
        self.parts = nn.ModuleList(parts)

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        found = [item for part in self.parts if isinstance(part, BlockAdapter) for item in part._weights()]
        yield from sorted(found, key=lambda item: _block_of(item[0]))


def _block_of(name: str) -> int:
    return int(name.partition(".")[0])


def _has_updates(adapter: BlockAdapter) -> bool:
    return any(name.endswith(".lora_A") for name in adapter.named_weights())
