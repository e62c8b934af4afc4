"""An adapter's weights at one moment, as they travel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmcore.client.adapter_weights import AdapterWeights
from swarmcore.executor.torch.tensors import to_wire
from swarmcore.types import Span
from swarmcore.wire.passes import AdapterName
from swarmcore.wire.tensors import Tensor

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter


def snapshot(adapter: BlockAdapter | str | None, span: Span) -> AdapterWeights | None:
    """The weights for ``span`` as they are now, whatever an optimiser does to them afterwards.

    A string names an adapter that the servers have. None where there is nothing to use.
    """
    if adapter is None or isinstance(adapter, str):
        return AdapterWeights(AdapterName(name=adapter)) if adapter else None
    tensors: dict[int, list[Tensor]] = {}
    for name, weight in adapter.named_weights(span).items():
        block = int(name.partition(".")[0])
        tensors.setdefault(block, []).append(to_wire(name, weight.detach().clone()))
    if not tensors:
        return None
    weights = {block: tuple(found) for block, found in tensors.items()}
    return AdapterWeights(AdapterName(version=adapter.version), adapter.scaling, weights)
