"""``codec="auto"`` from end to end: what crosses a slow link and a fast one, with the real codecs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from memory_swarm import Server, Swarm, swarm_of
from pass_swarm import alone, quiet

import swarmcore.executor.torch.executor  # noqa: F401  registers the codecs
from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import BatchPlanner
from swarmcore.client.autograd.rpc import MicroBatch
from swarmcore.registry.memory import MemoryRegistry
from swarmcore.routing.link_codec import TensorKind
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.faulty import Faults
from swarmcore.testing.rows import Rows, hidden_states, read_rows
from swarmcore.types import PeerId, Span
from swarmcore.wire.tensors import Tensor

pytestmark = pytest.mark.virtual_time

TOKENS = 4096
RAW_BYTES = TOKENS * COUNTING_MODEL.hidden_size * 4
SPAN = Span(0, 2)


class Client:
    """Sends one micro-batch after the other, and writes down which codecs were chosen."""

    def __init__(self, swarm: Swarm) -> None:
        registry = MemoryRegistry(swarm.client.peer, swarm.directory)
        planner = BatchPlanner(registry, swarm.health, COUNTING_MODEL, swarm.planner)
        options = PassOptions(codec="auto", timeout=900)
        self.runner = BatchRunner(swarm.client, planner, COUNTING_MODEL, options)
        self.chosen: dict[tuple[PeerId, TensorKind], tuple[str, str]] = {}
        """The last ones, up and down."""
        choose = self.runner.codecs.choose

        def noted(
            peer: PeerId, kind: TensorKind, rows: Tensor, now: float, chain: Iterable[PeerId] = ()
        ) -> Any:
            self.chosen[peer, kind] = choose(peer, kind, rows, now, chain)
            return self.chosen[peer, kind]

        self.runner.codecs.choose = noted  # type: ignore[method-assign]

    async def there_and_back(self, rows: Rows, gradients: Rows) -> tuple[Rows, Rows]:
        batch = MicroBatch((TOKENS // 2, TOKENS // 2), timeout=900)
        contexts = await self.runner.forward(SPAN, [(batch, hidden_states(rows))], needs_backward=True)
        [back] = await self.runner.backward(contexts, [hidden_states(gradients)])
        assert back.gradients is not None
        return read_rows(contexts[0].outputs), read_rows(back.gradients)

    def codecs(self, server: Server) -> set[str]:
        return {codec for kind in ("activations", "gradients") for codec in self.chosen[server.peer, kind]}


async def test_a_slow_link_gets_fewer_bytes_and_a_fast_one_all_of_them() -> None:
    rng = random.Random(1)
    rows, up = ([[rng.uniform(-1, 1) for _ in range(4)] for _ in range(TOKENS)] for _ in range(2))
    outputs, gradients, _ = await alone(rows, up, (TOKENS // 2, TOKENS // 2), str(SPAN))
    async with swarm_of() as swarm:
        fast, slow = await swarm.add("0:1"), await swarm.add("1:2")
        for server in (fast, slow):
            server.executor.pass_seconds = 1 / TOKENS  # a second there, two of them back
        client = Client(swarm)

        def set_rate(rate: float) -> None:
            swarm.client_transport.faults_toward[slow.peer] = Faults(rate=rate)
            slow.transport.faults = Faults(rate=rate)

        set_rate(RAW_BYTES / 6)
        for _ in range(3):
            got = await client.there_and_back(rows, up)
        assert client.codecs(fast) == {"raw"}
        assert all(codec.startswith("mixed") for codec in client.codecs(slow)), client.chosen
        assert 0 < _error(got[0], outputs) < 0.2 and 0 < _error(got[1], gradients) < 0.2

        set_rate(math.inf)
        for _ in range(30):
            got = await client.there_and_back(rows, up)
            if client.codecs(slow) == {"raw"}:
                break
        assert got == (outputs, gradients)
        await quiet(swarm)


def _error(found: Rows, expected: Rows) -> float:
    """Relative, over all values."""
    pairs = [
        (a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / sum(b * b for _, b in pairs))
