"""What a hosted session keeps of its outputs, to send them to a stage that is new to the session."""

from __future__ import annotations

from collections import Counter

from swarmcore.errors import InvalidStepError
from swarmcore.executor.base import BlockExecutor
from swarmcore.resources import ResourceManager
from swarmcore.server.kept import Kept
from swarmcore.session.journal import Entry, KeptOutputs
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import Replay, Step
from swarmcore.wire.tensors import ITEM_BYTES, Tensor


class ReplayOutputs:
    """A session's `KeptOutputs`, counted for its client, dropped when others need the room."""

    def __init__(
        self,
        sequences: int,
        *,
        executor: BlockExecutor,
        resources: ResourceManager,
        client: PeerId,
        counters: Counter[str],
        limits: Limits,
    ) -> None:
        self._outputs = KeptOutputs(sequences)
        self._executor = executor
        self._counters = counters
        self._limits = limits
        self._held = Kept(resources, client, self._drop)

    def keep(self, step: Step, output: Tensor) -> None:
        """The output of a step that has been computed and sent on."""
        entry = Entry(step.step, step.starts, step.lengths, step.sources)
        self._outputs.settle(step.settled)
        self._outputs.keep(entry, output, settled=step.replay)
        self._held.resize(self._outputs.nbytes)

    async def rows(self, order: Replay) -> Tensor:
        """What ``order`` asks for, encoded as it says; decoded and encoded off the event loop.

        Raise `InvalidStepError` for rows that are not here, and for more than can be sent at a time,
        `SessionLostError` when they were dropped.
        """
        # Sequences may share rows, and a row may be all that is left of a tensor: neither is to multiply.
        nbytes = sum(order.lengths) * self._executor.model.hidden_size * ITEM_BYTES[self._executor.dtype]
        if not 0 < nbytes <= self._limits.max_message:
            raise InvalidStepError(
                f"a replay of {sum(order.lengths)} tokens takes {nbytes} bytes; expected 1 to "
                f"{self._limits.max_message}: ask for fewer at a time"
            )
        self._outputs.settle(order.settled)
        tensors = self._outputs.tensors(order.starts, order.lengths)
        if sum(tensor.decoded_nbytes for tensor in tensors) > self._limits.max_decoded:
            raise InvalidStepError("the replay touches too many outputs; ask for fewer tokens at a time")
        decoded = {id(tensor): await self._executor.decode(tensor) for tensor in tensors}
        rows = self._outputs.rows(order.starts, order.lengths, decoded)
        return rows if order.codec == "raw" else await self._executor.encode(rows, order.codec)

    def close(self) -> None:
        self._held.close()

    def _drop(self) -> None:
        self._counters["outputs_dropped"] += 1
        self._outputs.drop()
