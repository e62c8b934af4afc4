"""What a server's time goes to: a cost model, fitted to a measurement that is kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import attrs
import msgspec

from swarmcore.errors import InputError
from swarmcore.executor.base import ScheduledChunk

_PROMPT = 512


@attrs.frozen(kw_only=True)
class BatchLoad:
    """What one batch is made of."""

    decode_rows: int = 0
    """Rows that are the only new one of their sequence."""
    prefill_rows: int = 0
    """All other rows."""
    decode_attended: int = 0
    """Cached tokens that decode rows look at, summed over the rows."""
    prefill_attended: int = 0
    """The same for prefill rows: those of one sequence look at its cache together, which is cheaper."""

    @classmethod
    def of_prompts(cls, lengths: Sequence[int]) -> BatchLoad:
        """Sequences from their first token on."""
        attended = sum(length * (length - 1) // 2 for length in lengths)
        return cls(prefill_rows=sum(lengths), prefill_attended=attended)

    @classmethod
    def of(cls, batch: Sequence[ScheduledChunk]) -> BatchLoad:
        decode = prefill = decode_attended = prefill_attended = 0
        for part in batch:
            for segment in part.segments:
                count, start = segment.count, segment.start
                if count == 1:
                    decode += 1
                    decode_attended += start
                else:
                    prefill += count
                    prefill_attended += count * start + count * (count - 1) // 2
        return cls(
            decode_rows=decode,
            prefill_rows=prefill,
            decode_attended=decode_attended,
            prefill_attended=prefill_attended,
        )


@attrs.frozen(kw_only=True)
class CostModel:
    """Seconds of a batch: a part for the batch, and for each block one of its own, for rows and for cache."""

    call: float
    """Of every batch, however many blocks it runs through."""
    block: float
    """Of every block of a batch: reading its weights."""
    decode_row: float
    """Of every block, for each `BatchLoad.decode_rows`."""
    decode_attended: float
    """Of every block, for each `BatchLoad.decode_attended`."""
    prefill_row: float
    """Of every block, for each `BatchLoad.prefill_rows`."""
    prefill_attended: float
    """Of every block, for each `BatchLoad.prefill_attended`."""

    def seconds(self, blocks: int, load: BatchLoad) -> float:
        """How long ``blocks`` blocks take for a batch."""
        per_block = (
            self.block
            + self.decode_row * load.decode_rows
            + self.decode_attended * load.decode_attended
            + self.prefill_row * load.prefill_rows
            + self.prefill_attended * load.prefill_attended
        )
        return self.call + blocks * per_block


@attrs.frozen(kw_only=True)
class Measurement:
    """One line of what a cost model was fitted to."""

    blocks: int
    load: BatchLoad
    seconds: float


@attrs.frozen(kw_only=True)
class MeasuredModel:
    """A real model on a real machine: its shape, its costs, and where they come from."""

    name: str
    blocks: int
    row_bytes: int
    """Of hidden states: one token."""
    cache_bytes: int
    """Of attention cache: one token, one block."""
    block_bytes: int
    """Of weights: one block."""
    machine: str
    """What the figures hold for, or what was assumed."""
    command: str
    """What makes this file anew."""
    costs: CostModel
    client_seconds: float = 0.0
    """Of the client for each step: head, choice, embedding."""
    load_seconds: float = 1.0
    """To load one block."""
    fit_error: float = 0.0
    """How far a measured batch is from the model, as a fraction; root mean square."""
    measured: tuple[Measurement, ...] = ()

    def throughput(self, blocks: int) -> float:
        """Tokens per second through ``blocks`` blocks, in batches of a long prompt."""
        return _PROMPT / self.costs.seconds(blocks, BatchLoad(prefill_rows=_PROMPT))


def load_costs(name: str) -> MeasuredModel:
    """The measurement in the file ``name``, or one of those that come with swarmcore (see `cost_names`).

    Raise `InputError` when there is none, or it is no such file.
    """
    if name in cost_names():
        content = resources.files(__package__).joinpath("costs", f"{name}.json").read_bytes()
    else:
        try:
            content = Path(name).read_bytes()
        except OSError as exc:
            known = ", ".join(cost_names())
            raise InputError(f"no measured costs {name!r}: neither a file nor one of {known}") from exc
    try:
        return msgspec.json.decode(content, type=MeasuredModel)
    except msgspec.DecodeError as exc:
        raise InputError(f"{name} does not hold measured costs: {exc}") from exc


def cost_names() -> list[str]:
    """The measurements that come with swarmcore."""
    folder = resources.files(__package__).joinpath("costs")
    return sorted(
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")
    )
