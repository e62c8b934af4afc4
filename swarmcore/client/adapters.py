"""The adapter that a batch or a session uses, as the client sends it to servers that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.rpc.channel import Channel
from swarmcore.wire.forward_backward import AdapterName, AdapterPart, adapter_parts
from swarmcore.wire.tensors import Tensor


@attrs.frozen(eq=False)
class AdapterWeights:
    """An adapter as passes and sessions use it: its name, and the weights where they are the client's own.

    A snapshot: what is trained meanwhile has another version.
    """

    name: AdapterName
    scaling: float = 1.0
    tensors: Mapping[int, tuple[Tensor, ...]] = attrs.field(factory=dict, repr=False)
    """The weights of each block, under their names on the wire; empty for an adapter of the servers."""

    def tensors_of(self, blocks: Iterable[int]) -> list[Tensor]:
        """The weights of ``blocks``, in their order."""
        return [tensor for block in blocks for tensor in self.tensors.get(block, ())]

    async def send(
        self, channel: Channel, blocks: Sequence[int], *, progressed: Callable[[], None] = lambda: None
    ) -> None:
        """Send the weights of ``blocks``; ``progressed`` is called after each part.

        Raise `ProtocolError` when they are not the client's to send.
        """
        if not self.tensors:
            raise ProtocolError(f"the server asked for the weights of its own adapter {self.name.name!r}")
        for part, last in adapter_parts(self.tensors_of(blocks)):
            await channel.send(AdapterPart(self.scaling, last=last), *part)
            progressed()
