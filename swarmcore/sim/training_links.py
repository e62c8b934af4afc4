"""Codecs by link, in a simulated network: what `link_times` calculates, with everything that it leaves out.

Codecs need arithmetic that the simulator has none of, so theirs only have the right sizes: what they make
of a tensor is as long as it would be, and all that comes out of them is zeros. The time that encoding takes
is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import attrs

from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import BatchCodecs
from swarmcore.errors import InternalError
from swarmcore.routing.link_codec import LADDERS, LinkCodec, Rung, TensorKind
from swarmcore.sim.costs import load_costs
from swarmcore.sim.hosts import Geography
from swarmcore.sim.link_times import FIXED, KINDS, SETTLING
from swarmcore.sim.model import SimModel
from swarmcore.sim.trainer import MicroBatches, Trainer, TrainingServer, TrainingSwarm
from swarmcore.sim.world import World
from swarmcore.types import PeerId, Span
from swarmcore.wire.tensors import ITEM_BYTES, Tensor, register_codec

COUNTED = 16
"""Micro-batches after those for settling."""

WORK = MicroBatches((1024,), keep=True)
SPAN = Span(0, 8)
"""Of the server: half a second for a micro-batch of the paper's model, and a second back."""

ROW_BYTES = 4096
"""Of simulated rows; they count as many as those of the model. Long enough to travel in several pieces, each
of which has to be there in time over the slowest link."""

DELAY = 30.0
"""Milliseconds one way."""

AT_ONCE = (1, 2)
"""Micro-batches under way: one by itself, and two, one of which computes while the other travels. With more,
pieces of one would come more than a minute apart over the slowest link, and servers do not wait that long."""

TIMEOUT = 900.0

_CLIENT = 100_000.0


class SizeOfCodec:
    """As long as a tensor would be in a codec of so many bits a value."""

    def __init__(self, bits: float) -> None:
        self._bits = bits

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(self.encoded_nbytes(dtype, shape)))

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(math.prod(shape) * ITEM_BYTES[dtype]))

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return math.ceil(math.prod(shape) * self._bits / 8)


@attrs.frozen(kw_only=True)
class LinkResult:
    """Micro-batches there and back through one server over one link."""

    mbits: float
    codec: str
    """`PassOptions.codec`."""
    at_once: int
    seconds: float
    """Between one micro-batch that is back and the next, on average."""
    codecs: dict[TensorKind, str]
    """Those that were used most."""
    trace: str
    messages: int


def link_runs(costs: str, seed: int, mbits: float) -> list[LinkResult]:
    """Nothing lost, the same codec always, and as the link allows; over a link of ``mbits`` Mbit/s."""
    return [
        LinkRun(costs, seed, mbits, codec, at_once).result()
        for at_once in AT_ONCE
        for codec in ("raw", FIXED, "auto")
    ]


def _sized(codec: str) -> str:
    return codec if codec in ("raw", "auto") else f"size of {codec}"


def _register() -> dict[TensorKind, tuple[Rung, ...]]:
    """Make codecs known that are as long as those of `LADDERS`; return ladders of them."""
    for rung in (rung for ladder in LADDERS.values() for rung in ladder):
        register_codec(_sized(rung.codec), SizeOfCodec(rung.bits))
    return {kind: tuple(Rung(_sized(rung.codec), rung.bits) for rung in LADDERS[kind]) for kind in KINDS}


class _CountedCodecs(BatchCodecs):
    def __init__(self, codec: str) -> None:
        super().__init__(_sized(codec), LinkCodec(ladders=_register()))
        self.used: Counter[tuple[TensorKind, str]] = Counter()

    def choose(
        self, peer: PeerId, kind: TensorKind, rows: Tensor, now: float, chain: Iterable[PeerId] = ()
    ) -> tuple[str, str]:
        chosen = super().choose(peer, kind, rows, now, chain)
        self.used.update((kind, codec) for codec in chosen)
        return chosen

    def usual(self, kind: TensorKind) -> str:
        """Chosen most since ``used`` was cleared."""
        [((_, codec), _)] = Counter({key: n for key, n in self.used.items() if key[0] == kind}).most_common(1)
        return codec.removeprefix(_sized(""))


class LinkRun:
    """Over one link, in a world of its own."""

    def __init__(
        self, costs: str, seed: int, mbits: float, codec: str, at_once: int, *, row_bytes: int = ROW_BYTES
    ) -> None:
        measured = load_costs(costs)
        self._mbits, self._codec, self._at_once = mbits, codec, at_once
        model = SimModel(measured.name, measured.blocks, row_bytes, "bfloat16")
        self._world = World(f"{seed}/links", Geography(floor=DELAY), measured, model)
        server = TrainingServer(self._world, "server", SPAN, speed=1.0, megabits=mbits)
        self._swarm = TrainingSwarm(self._world, [server], span=SPAN)

    def result(self) -> LinkResult:
        return self._world.run(self._run)

    async def _run(self) -> LinkResult:
        options = PassOptions(in_flight=self._at_once, timeout=TIMEOUT, keep=True)
        runner = await self._swarm.start(options, megabits=_CLIENT)
        runner.codecs = codecs = _CountedCodecs(self._codec)
        trainer = Trainer(self._world, runner, WORK, SPAN, checked=False)
        # A codec that never changes has nothing to learn.
        settling = SETTLING if self._codec == "auto" else 2 * self._at_once
        last = settling + COUNTED
        trainer.at[settling] = codecs.used.clear
        # The last ones are not counted: fewer and fewer are under way.
        await trainer.streams(last + self._at_once, self._at_once)
        if trainer.problems:
            raise InternalError(f"over {self._mbits:g} Mbit/s {trainer.problems[0]}")
        return LinkResult(
            mbits=self._mbits,
            codec=self._codec,
            at_once=self._at_once,
            seconds=(trainer.finished[last - 1] - trainer.finished[settling - 1]) / COUNTED,
            codecs={kind: codecs.usual(kind) for kind in KINDS},
            trace=self._world.trace.hash,
            messages=self._world.trace.messages,
        )
