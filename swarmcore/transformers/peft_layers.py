"""The blocks' linear layers as modules without weights, for PEFT to put low-rank updates on.

A remote model has its blocks on servers. What is here are modules with the layers' names and sizes, where
PEFT looks for them: ``peft.get_peft_model``, ``model.add_adapter`` and ``PeftModel.from_pretrained`` wrap
them as they wrap those of a local model. Before each pass the updates are collected, and go to the servers as
an adapter; nothing here is ever called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import attrs
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarmcore.errors import AdapterError, InternalError
from swarmcore.training.adapter import BlockAdapter
from swarmcore.training.model_layout import ModelLayout, Projection
from swarmcore.training.peft_format.config import LORA, check_lora_config

_ABOUT = frozenset(
    {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")}
    | {
        getattr(torch.Tensor, name).__get__
        for name in ("requires_grad", "is_leaf", "is_meta", "is_quantized")
    }
    | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}
    | {torch.is_floating_point, torch.Tensor.is_complex, torch.Tensor.element_size}
)
"""What a tensor can be asked without its values."""


class RemoteWeight(torch.Tensor):
    """A weight that servers have: its shape and dtype, and `AdapterError` for whoever asks for its values."""

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> RemoteWeight:
        values = torch.zeros((), dtype=dtype).expand(shape)
        return torch.Tensor._make_subclass(RemoteWeight, values)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ABOUT:
            raise AdapterError(
                "the weights of the blocks are on the servers, and whatever starts from them or changes them "
                "does not work here: init_lora_weights='pissa', 'olora', 'corda', 'loftq', 'lora_ga' or "
                "'mica', use_dora, kasa_config, AdaLoRA, and merging; use LoRA with init_lora_weights True, "
                "False, 'gaussian' or 'orthogonal'"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **options: Any) -> Any:  # type: ignore[override]
        return f"RemoteWeight({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _WithoutValues(nn.Module):
    """A linear layer of a block on a server."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise InternalError("a block's layer was called here, and is on a server")


class RemoteLinear(_WithoutValues, nn.Linear):
    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = projection.inputs, projection.outputs
        self.weight = RemoteWeight.of((projection.outputs, projection.inputs), dtype)
        self.bias = None  # type: ignore[assignment]


class RemoteConv1D(_WithoutValues, Conv1D):  # type: ignore[misc]
    """A linear layer of those families that keep its weight the other way round."""

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = projection.inputs, projection.outputs
        self.weight = RemoteWeight.of((projection.inputs, projection.outputs), dtype)
        self.bias = None


class RemoteLayers(nn.ModuleList):
    """Takes the place of a model's list of layers. A family's loop over its layers finds none in it."""

    def __init__(self, layout: ModelLayout, dtype: torch.dtype) -> None:
        super().__init__()
        self._layout, self._dtype = layout, dtype
        self.configs: dict[str, Any] = {}
        """PEFT's configs of the adapters that it has put on the layers, by their names; its own dictionary,
        to which it adds."""
        self.restore()

    def restore(self) -> None:
        """Make all layers anew, without whatever was put on them."""
        self._modules.clear()
        for projection in self._layout.projections:
            *path, last = projection.name.split(".")
            parent: nn.Module = self
            for name in path:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            kind = RemoteConv1D if projection.transposed else RemoteLinear
            parent.add_module(last, kind(projection, self._dtype))

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return nn.ModuleList()
        raise AdapterError(
            f"layer {index} is on servers: it cannot be called, copied or replaced here (as "
            f"layer_replication would); model.blocks[{index}] runs it there"
        )

    def updates(self) -> list[Update]:
        """What PEFT has put on the layers and is active now.

        Raise `AdapterError` for anything but low-rank updates, and for those with more to them.
        """
        updates = [update for path, layer in _replaced(self) for update in _updates_of(layer, path)]
        for name in {update.adapter for update in updates} & self.configs.keys():
            check_lora_config(self.configs[name])
        return updates


@attrs.frozen(eq=False)
class Update:
    """A low-rank update of one layer."""

    layer: str
    """As on the wire: ``<block>.<module>``."""
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    adapter: str = ""
    """PEFT's name of the adapter that it is of."""


class LayerUpdates(BlockAdapter):
    """The updates on a model's layers as an adapter of its blocks: the parameters are PEFT's own."""

    def __init__(self, updates: Sequence[Update], besides: BlockAdapter | None = None) -> None:
        """Several updates of one layer add up, those of the adapter ``besides`` too."""
        others: dict[str, torch.Tensor] = {}
        if besides is not None:
            weights = besides.named_weights()
            names = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
            pairs = [(name, weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]) for name in names]
            updates = [*updates, *(Update(*pair, besides.scaling) for pair in pairs)]
            others = {name: weight for name, weight in weights.items() if ".lora_" not in name}
        by_layer: dict[str, list[Update]] = {}
        for update in updates:
            by_layer.setdefault(update.layer, []).append(update)
        scalings = {update.scaling for update in updates}
        one = len(scalings) == 1 and len(by_layer) == len(updates)
        super().__init__(
            scaling=scalings.pop() if one else 1.0, prefix_tokens=besides.prefix_tokens if besides else 0
        )
        used = [weight for each in updates for weight in (each.down, each.up)] + list(others.values())
        self._identity = tuple(map(id, used))
        self._named: dict[str, torch.Tensor] = {}
        for layer, parts in by_layer.items():
            downs, ups = [part.down for part in parts], [part.up for part in parts]
            self._named[f"{layer}.lora_A"] = downs[0] if one else torch.cat(downs)
            self._named[f"{layer}.lora_B"] = (
                ups[0] if one else torch.cat([part.up * part.scaling for part in parts], dim=1)
            )
        self._named |= others

    @property
    def identity(self) -> object:
        return self._identity

    def _weights(self) -> Iterator[tuple[str, Any]]:
        return iter(self._named.items())


@contextmanager
def using_layers(model: Any) -> Iterator[None]:
    """Within it, in this thread, the blocks of ``model`` have what PEFT has put on its layers, besides the
    adapter that is in use.

    Raise `AdapterError` as `RemoteLayers.updates` does, and where the other adapter is one of the servers.
    """
    layers, other = _layers_of(model), model.stack.adapter
    updates = layers.updates() if layers is not None and not isinstance(other, LayerUpdates) else []
    if not updates:
        yield
        return
    if isinstance(other, str):
        raise AdapterError(
            f"the adapter {other!r} of the servers does not go together with one that PEFT has put on the "
            f"layers: use one of them"
        )
    with model.stack.using(LayerUpdates(updates, other)):
        yield


def _layers_of(model: Any) -> RemoteLayers | None:
    return next((m for m in model.base_model.modules() if isinstance(m, RemoteLayers)), None)


def check_injected(model: Any, configs: dict[str, Any]) -> None:
    """Raise `AdapterError` for what PEFT has made of the layers and nobody computes.

    ``configs`` are those that it did it by. The layers are as they were then, unless there was an adapter on
    them before, which would be lost.
    """
    layers = _layers_of(model)
    if layers is None:
        return
    before, layers.configs = layers.configs, configs
    try:
        for config in configs.values():
            if config.peft_type == LORA:
                check_lora_config(config)
        for path, layer in _replaced(layers):
            _check_kind(layer, path)
    except AdapterError:
        if not before:
            layers.restore()
            layers.configs = {}
            model._hf_peft_config_loaded = False
        raise


def _replaced(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything below that is not as it was made."""
    for name, child in module._modules.items():
        if type(child) is nn.Module:
            yield from _replaced(child, f"{prefix}{name}.")
        elif child is not None and not isinstance(child, _WithoutValues):
            yield f"{prefix}{name}", child


def _updates_of(layer: Any, path: str) -> list[Update]:
    """The active updates of a layer that PEFT has wrapped."""
    _check_kind(layer, path)
    if layer.disable_adapters:
        return []
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise AdapterError(
            f"layer {path} has hooks on it, which nobody calls, since it is on a server: leave out "
            f"adapter_names, and inits that watch activations"
        )
    if layer.merged:
        raise AdapterError(f"the update of layer {path} is merged into it, and its weight is on a server")
    updates = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        _check_plain(layer, name, path)
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        updates.append(Update(path, down, up, float(layer.scaling[name]), name))
    return updates


def _check_kind(layer: nn.Module, path: str) -> None:
    """Raise `AdapterError` unless it is what PEFT's LoRA makes of a linear layer."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or not isinstance(layer.base_layer, _WithoutValues):
        raise AdapterError(
            f"layer {path} was replaced by a {type(layer).__module__}.{type(layer).__name__}, which servers "
            f"do not compute: of PEFT's methods they have LoRA; soft prompts, heads and what is put on the "
            f"embeddings are computed here"
        )


def _check_plain(layer: Any, name: str, path: str) -> None:
    """Raise `AdapterError` unless the update is a product of two matrices and nothing else."""
    variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
    if variant is not None or layer.use_dora.get(name):
        what = type(variant).__name__ if variant is not None else "use_dora"
        raise AdapterError(f"the adapter {name!r} is a variant of LoRA ({what}) that servers do not compute")
    own = {key for key, _ in layer.named_parameters() if f".{name}." in f".{key}."}
    if more := sorted(own - {f"lora_A.{name}.weight", f"lora_B.{name}.weight"}):
        raise AdapterError(
            f"layer {path} has {', '.join(more)}, which servers do not compute (lora_bias=True?)"
        )
    dropout = getattr(layer.lora_dropout, name, None)
    if dropout is not None and dropout.training and getattr(dropout, "p", 0.0):
        raise AdapterError(
            f"the adapter {name!r} has lora_dropout={dropout.p}, which servers do not draw: set it to 0 to "
            f"train, or call eval() to use the adapter"
        )
