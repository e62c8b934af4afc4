"""Adapters that the torch backend has made ready: checked against the blocks that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from swarmcore.errors import AdapterError, InternalError, SwarmError
from swarmcore.executor.base import Adapter
from swarmcore.executor.torch.batch import TargetModule
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.wire_tensors import to_torch
from swarmcore.types import Span
from swarmcore.wire.tensors import FLOATS, Tensor

_UPDATE = re.compile(r"(\d{1,6})\.(.+)\.lora_[AB]")
_PREFIX = re.compile(r"(\d{1,6})\.prefix")


class TorchAdapter(Adapter):
    """Weights by their names on the wire, on the blocks' device, in the dtypes that they came in."""

    def __init__(
        self, weights: dict[str, torch.Tensor], targets: Sequence[TargetModule], scaling: float
    ) -> None:
        self.weights, self.targets, self.scaling = weights, targets, scaling
        self.prefixes = {int(match[1]): name for name in weights if (match := _PREFIX.fullmatch(name))}
        """The names of the prefixes' weights, by block."""
        blocks = self.prefixes.keys() | {target.block for target in targets}
        self.span = Span(min(blocks), max(blocks) + 1)
        self.prefix_tokens = max((weights[name].shape[1] for name in self.prefixes.values()), default=0)
        self._by_block: dict[int, list[str]] = {}
        for name in weights:
            self._by_block.setdefault(int(name.partition(".")[0]), []).append(name)
        # Steps of inference make a second copy of the low-rank weights (`StackedAdapters`).
        self.nbytes = sum(weight.nbytes + 4 * weight.numel() for weight in weights.values())

    def __repr__(self) -> str:
        prefix = f" · prefix of {self.prefix_tokens}" if self.prefix_tokens else ""
        return f"<TorchAdapter {self.span} · {len(self.targets)} low-rank updates{prefix}>"

    def names_in(self, block: int) -> list[str]:
        """The names of the weights for one block."""
        return self._by_block.get(block, [])

    def weights_in(self, span: Span) -> dict[str, torch.Tensor]:
        """The weights for the blocks of ``span``."""
        names = [name for block in span for name in self.names_in(block)]
        return {name: self.weights[name] for name in names}


def make_adapter(
    tensors: Sequence[Tensor], scaling: float, loaded: LoadedBlocks, dtype: torch.dtype, device: torch.device
) -> TorchAdapter:
    """As `BlockExecutor.load_adapter`, for ``loaded``, which computes in ``dtype``."""
    if not math.isfinite(scaling):
        raise AdapterError(f"the adapter's scaling is {scaling}; expected a finite number")
    weights: dict[str, torch.Tensor] = {}
    targets: dict[tuple[int, str], TargetModule] = {}
    for tensor in tensors:
        name = tensor.name
        if name in weights:
            raise AdapterError(f"the adapter has two tensors named {name!r}")
        if match := _UPDATE.fullmatch(name):
            targets.setdefault((int(match[1]), match[2]), TargetModule(int(match[1]), match[2]))
        elif not (match := _PREFIX.fullmatch(name)):
            raise _unknown(name)
        block = int(match[1])
        if not loaded.holds(Span(block, block + 1)):
            raise AdapterError(f"the adapter has weights for block {block}; held here are {loaded.span}")
        weights[name] = _values(tensor, dtype, device)
    if not weights:
        raise AdapterError("the adapter has no weights for these blocks")
    for target in targets.values():
        _check_update(target, weights, scaling, loaded, dtype)
    adapter = TorchAdapter(weights, list(targets.values()), scaling)
    for block, name in adapter.prefixes.items():
        _check_prefix(block, weights[name], adapter.prefix_tokens, loaded)
    return adapter


def check_description(
    name: str, dtype: str, shape: tuple[int, ...], span: Span, loaded: LoadedBlocks, max_tokens: int
) -> None:
    """As `BlockExecutor.check_adapter`; prefixes have ``max_tokens`` tokens at most."""
    update = _UPDATE.fullmatch(name)
    prefix = None if update else _PREFIX.fullmatch(name)
    match = update or prefix
    if match is None:
        raise _unknown(name)
    block = int(match[1])
    if not span.start <= block < span.end or not loaded.holds(Span(block, block + 1)):
        raise AdapterError(f"the adapter has weights for block {block}; asked for were those of {span}")
    if dtype not in FLOATS:
        raise AdapterError(f"the adapter's tensor {name!r} is {dtype}; expected {', '.join(FLOATS)}")
    if prefix is not None:
        [layer] = loaded.layout(Span(block, block + 1)).layers
        expected = f"[2, 1 to {max_tokens}, {layer.heads}, {layer.key_size}]"
        fits = len(shape) == 4 and (shape[0], *shape[2:]) == (2, layer.heads, layer.key_size)
        rank, most = shape[1] if fits else 0, max_tokens
    else:
        sizes = _sizes(projection(loaded, TargetModule(block, match[2])))
        assert sizes is not None
        most, first = max(sizes), name.endswith("A")
        expected = f"[rank, {sizes[0]}]" if first else f"[{sizes[1]}, rank]"
        fits = len(shape) == 2 and shape[first] == sizes[not first]
        rank = shape[not first] if fits else 0
        expected += f" with a rank of 1 to {most}"
    if not 0 < rank <= most:
        raise AdapterError(
            f"the adapter's tensor {name!r} has shape {list(shape[:8])}; expected {expected}: it was made "
            f"for another model"
        )


def _unknown(name: str) -> AdapterError:
    return AdapterError(
        f"the adapter's tensor {name!r} is of no kind that is served; expected "
        f"BLOCK.MODULE.lora_A, BLOCK.MODULE.lora_B or BLOCK.prefix"
    )


def own_adapter(adapter: Adapter | None, span: Span) -> TorchAdapter | None:
    """``adapter`` as this backend's own. Raise `AdapterError` when only some of ``span`` have a prefix."""
    if adapter is None:
        return None
    if not isinstance(adapter, TorchAdapter):
        raise InternalError(f"{adapter!r} is no adapter of this executor")
    lacking = [block for block in span if block not in adapter.prefixes]
    if adapter.prefixes and lacking:
        raise AdapterError(f"the adapter has prefixes, but none for block {lacking[0]} of {span}")
    return adapter


def projection(loaded: LoadedBlocks, target: TargetModule) -> nn.Module:
    """The module that ``target`` names. Raise `AdapterError` when it is no linear projection of all rows."""
    block = loaded.block(target.block)
    found: nn.Module | None = dict(block.named_modules()).get(target.module)
    # An expert sees the rows that are routed to it, which nobody could tell apart by adapter.
    if found is not None and _sizes(found) and ".experts." not in f".{target.module}.":
        return found
    known = [name for name, module in block.named_modules() if _sizes(module) and ".experts." not in name]
    what = "is a part of routed experts, which take no adapters" if "expert" in target.module else "is none"
    raise AdapterError(
        f"{target.module!r} {what}; block {target.block} has the projections {', '.join(known)}"
    )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """How many values go into a linear projection and come out of it; None for other modules."""
    if isinstance(getattr(module, "in_features", None), int):  # nn.Linear, packed ones, quantised ones
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).__name__ == "Conv1D":  # transformers' own, in GPT-2
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _values(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        values = to_torch(tensor)
    except SwarmError as exc:
        raise AdapterError(f"the adapter cannot be read: {exc.message}") from exc
    if not torch.isfinite(values.to(dtype)).all():
        raise AdapterError(f"the adapter's tensor {tensor.name!r} has values that are not finite in {dtype}")
    return values.to(device, copy=True)


def _check_update(
    target: TargetModule,
    weights: dict[str, torch.Tensor],
    scaling: float,
    loaded: LoadedBlocks,
    dtype: torch.dtype,
) -> None:
    sizes = _sizes(projection(loaded, target))
    assert sizes is not None
    a, b = weights.get(target.lora_a), weights.get(target.lora_b)
    if a is None or b is None:
        lacking = target.lora_a if a is None else target.lora_b
        raise AdapterError(f"the adapter lacks {lacking!r}; an update needs lora_A and lora_B")
    rank = a.shape[0] if a.dim() == 2 else 0
    if not rank or a.shape != (rank, sizes[0]) or b.shape != (sizes[1], rank):
        raise AdapterError(
            f"the adapter's {target.block}.{target.module} has shapes {list(a.shape)} and {list(b.shape)}; "
            f"expected [rank, {sizes[0]}] and [{sizes[1]}, rank]: it was made for another model"
        )
    if not torch.isfinite((b * scaling).to(dtype)).all():
        raise AdapterError(f"{target.lora_b!r} times the scaling of {scaling} is not finite in {dtype}")


def _check_prefix(block: int, prefix: torch.Tensor, tokens: int, loaded: LoadedBlocks) -> None:
    [layer] = loaded.layout(Span(block, block + 1)).layers
    if layer.key_size != layer.value_size:
        raise AdapterError("this model's keys and values differ in size; it takes no prefixes")
    if not tokens or prefix.shape != (2, tokens, layer.heads, layer.key_size):
        raise AdapterError(
            f"the adapter's prefix of block {block} has shape {list(prefix.shape)}; expected "
            f"[2, tokens, {layer.heads}, {layer.key_size}] with the same tokens for all blocks: it was made "
            f"for another model"
        )
