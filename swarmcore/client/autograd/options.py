"""The options of batches that go through servers."""

from __future__ import annotations

import attrs

from swarmcore.errors import InputError

LEAST_IN_FLIGHT = 8
MOST_IN_FLIGHT = 64
PER_SERVER = 3
"""Micro-batches under way for each server that takes batches: one computes, one is on its way there or back,
and one makes up for the slower servers, which hold on to theirs for longer."""


@attrs.frozen(kw_only=True)
class PassOptions:
    """How batches travel. Raise `InputError` for values that cannot work."""

    micro_batch_tokens: int = 1024
    """Most tokens of one micro-batch; a longer sequence is one by itself."""
    in_flight: int | None = None
    """Most micro-batches under way at a time, of all calls together; None for `PER_SERVER` times as many as
    there are servers, from `LEAST_IN_FLIGHT` to `MOST_IN_FLIGHT`. Each is held in memory here."""
    timeout: float = 120.0
    """Seconds without progress, however slow, after which a server's pass of a micro-batch is given up."""
    patience: float = 60.0
    """Seconds to wait for a server that takes a micro-batch when there is none."""
    codec: str = "raw"
    """How rows are encoded on the way, as `SessionOptions.codec`; ``"auto"``: as each link allows, lossless
    where it is fast enough to be hidden by the computation, see `LinkCodec`."""
    keep: bool = True
    """Whether servers may keep activations for the backward pass, where there is one."""
    reproducible: bool = False
    """Have servers compute in an order that depends on the batch alone: the same batch through servers of one
    kind gives the same bits. Costs some speed."""

    def __attrs_post_init__(self) -> None:
        if self.micro_batch_tokens < 1 or (self.in_flight is not None and self.in_flight < 1):
            raise InputError("micro_batch_tokens and in_flight have to be 1 or more")
        if not (self.timeout > 0 and self.patience >= 0):
            raise InputError("timeout has to be above 0, and patience 0 or more")
