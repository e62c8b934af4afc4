"""The adapter that a batch or a session uses, as the client sends it to servers that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.rpc.channel import Channel
from swarmcore.wire.passes import AdapterName, AdapterPart
from swarmcore.wire.tensors import Tensor

PART_BYTES = 2 * 2**20
MAX_PART_TENSORS = 32
"""About how much of an adapter goes into one message."""


@attrs.frozen(eq=False)
class AdapterWeights:
    """An adapter as passes and sessions use it: its name, and the weights where they are the client's own.

    A snapshot: what is trained meanwhile has another version.
    """

    name: AdapterName
    scaling: float = 1.0
    tensors: Mapping[int, tuple[Tensor, ...]] = attrs.field(factory=dict, repr=False)
    """The weights of each block, under their names on the wire; empty for an adapter of the servers."""

    async def send(self, channel: Channel, blocks: Sequence[int]) -> None:
        """Send the weights of ``blocks``. Raise `ProtocolError` when they are not the client's to send."""
        if not self.tensors:
            raise ProtocolError(f"the server asked for the weights of its own adapter {self.name.name!r}")
        left: Sequence[Tensor] = [tensor for block in blocks for tensor in self.tensors.get(block, ())]
        while True:
            part, left = _part(left)
            await channel.send(AdapterPart(self.scaling, last=not left), *part)
            if not left:
                return


def _part(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """As many of the tensors as one message holds well, and the rest."""
    many, size = 0, 0
    while many < min(len(tensors), MAX_PART_TENSORS) and (not many or size < PART_BYTES):
        size += tensors[many].data.nbytes
        many += 1
    return tensors[:many], tensors[many:]
